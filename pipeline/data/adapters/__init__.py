"""Well-known schemas of foreign data sets: one module each turns their rows into ours."""
