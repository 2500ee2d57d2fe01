"""A run as one self-contained HTML page: charts, tables, samples, lineage."""
