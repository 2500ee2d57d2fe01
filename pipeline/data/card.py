"""The data folder's README: what the rows are, where they come from, what they do not show."""

from pipeline.data.collection import Collection
from pipeline.data.splits import SPLITS

CAVEAT = """
The human ratings of the default recipe say how positive a text reads, from -4 to 4. A model trained
on them learns to sound friendly. They do not say whether a reply is true, helpful or harmless.
"""


def card(collected: Collection) -> str:
    """Returns the Markdown card of the collected rows."""
    lines = ["# Data", "", "Parquet, one file per row type and split.", ""]
    lines += ["| rows | " + " | ".join(SPLITS) + " |", "|---|" + "---:|" * len(SPLITS)]
    for row_type, by_split in collected.counts.items():
        numbers = " | ".join(f"{by_split[split]:,}" for split in SPLITS)
        lines.append(f"| {row_type} | {numbers} |")
    lines += ["", "## Sources", ""]
    for entry in collected.ledger():
        version = f" {entry['version']}" if entry["version"] else ""
        lines.append(f"- {entry['origin']}{version}, licence {entry['licence']}")
        lines += [f"  - dropped, {why}: {count:,}" for why, count in entry["dropped"].items()]
    lines += ["", "## What it is", "", CAVEAT.strip(), ""]
    lines.append(
        "Splits are made by conversation, document or text. Every choice is made on validation; "
        "test is read once, by evaluate."
    )
    return "\n".join(lines)
