"""The chain of a run as plain text for a terminal."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.lineage import STATES, Row

WIDTH = 100
"""Columns of the terminal that the text keeps to."""
HEX = 12
"""Digits of a digest that are shown; --json has all of them."""
SHOWN = 4
"""Names or settings of a kind that are shown."""
NAMES = 19
"""Columns of a parent's name, where none is longer."""
COLUMNS = "{:<14}{:<12}{:<11}{:<14}{:<18}{:<20}{:>5}"


def chain_text(
    title: str,
    *,
    sources: Sequence[Mapping[str, str]],
    rows: Sequence[Row],
    commands: Sequence[str],
) -> str:
    """Returns the chain as text of at most WIDTH columns, where no single word is longer.

    Args:
        title: the first line.
        sources: origin, version, licence and sha256 of what the run began with.
        rows: its folders, parents first.
        commands: what mends it; none where all is good.
    """
    lines = [title, "", "Sources"]
    for source in sources:
        version, licence = source["version"] or "not pinned", source["licence"] or "unknown"
        lines += [f"  {source['origin']}", f"    version {version}, licence {licence}"]
        lines += [f"    sha256 {source['sha256'] or 'none'}"]
    head = ("stage", "state", "kind", "digest", "made (UTC)", "git commit", "files")
    lines += ["", COLUMNS.format(*head)]
    for row in rows:
        lines += row_lines(row)
    lines += ["", closing(rows)]
    if commands:
        lines += ["To mend it:", *(f"  {command}" for command in commands)]
    return "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in "\n".join(lines))


def row_lines(row: Row) -> list[str]:
    """Returns the lines of one folder: itself, its parents, and what was found."""
    entry, cells = row.entry, ["-"] * 5
    if entry is not None:
        made = entry.finished.replace("T", " ")[:16]
        cells = [entry.kind, entry.digest[:HEX], made, entry.git_commit[:18], str(len(entry.files))]
    lines = [COLUMNS.format(row.stage, row.state, *cells).rstrip()]
    links = entry.links if entry else ()
    width = max([NAMES, *(len(link.name) for link in links)])
    for link in links:
        nothing = "nothing there" if link.is_beside else "outside the run, not known where"
        found = link.found[:HEX] or nothing
        lines.append(f"  from {link.name:<{width}} recorded {link.recorded[:HEX]}  found {found}")
    for text in remarks(row):
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def remarks(row: Row) -> list[str]:
    """Returns what there is to say of a folder: its words, what is wrong, what is worth knowing."""
    altered = [finding.text for finding in row.findings if finding.state == "altered"]
    told = [f"altered: {some(altered)}"] if altered else []
    told += [f"{one.state}: {one.text}" for one in row.findings if one.state != "altered"]
    if row.entry and row.entry.overrides:
        told.insert(0, f"made with {' '.join(f'--{word}' for word in row.entry.overrides)}")
    return told + [f"note: {note}" for note in row.notes]


def closing(rows: Sequence[Row]) -> str:
    """Returns how much was read, and how many folders are in which state."""
    files = [file for row in rows if row.entry for file in row.entry.files.values()]
    size = sum(file["size"] for file in files) / 2**20
    counts = Counter(row.state for row in rows)
    told = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    verdict = "all good" if set(counts) == {"good"} else told
    return f"{len(rows)} folders, {len(files)} files, {size:,.1f} MiB: {verdict}"


def some(texts: Sequence[str]) -> str:
    """Returns the first of the texts, and how many more there are."""
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more
