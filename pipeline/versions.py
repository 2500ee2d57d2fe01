"""Formats on disk: what is said of a file that this version does not read."""

from typing import Any


def refusal(manifest: Any, *, reads: int) -> str:
    """Returns what is wrong with a manifest that is not of the format this version reads.

    It names what wrote it, since that reads it still.

    Args:
        manifest: whatever the file holds.
        reads: the format of this version.
    """
    parts = manifest if isinstance(manifest, dict) else {}
    content, about = parts.get("content"), parts.get("circumstances")
    found = content.get("format_version") if isinstance(content, dict) else None
    if found is None:
        return f"is not a manifest: it names no format (this version reads format {reads})"
    commit = about.get("git_commit", "unknown") if isinstance(about, dict) else "unknown"
    return (
        f"is not of format {reads}, which this version reads, but of {found!r}: "
        f"read it with the version that wrote it (commit {commit})"
    )
