"""What the doctor found, as a table for a terminal and what to do about it."""

from collections.abc import Mapping, Sequence

from pipeline.doctor.checks import Finding
from pipeline.doctor.lengths import UNKNOWN, Lengths
from pipeline.doctor.machine import GB
from pipeline.doctor.need import Need
from pipeline.doctor.needs import Planner
from pipeline.doctor.recipe import Recipe

SIGNS = {"good": "ok", "wrong": "NO", "unknown": "--"}
COLUMNS = ("stage", "weights", "gradients", "optimizer", "working", "base", "total", "of", "fits")


def told(
    recipe: Recipe,
    planner: Planner,
    *,
    needs: Sequence[Need],
    findings: Sequence[Finding],
    mending: Mapping[str, str],
) -> str:
    """Returns the whole answer.

    Args:
        recipe: that was looked at.
        planner: that says what it needs, of its machine and of its rows' lengths.
        needs: of its stages.
        findings: of the checks.
        mending: what makes a stage fit, by stage.
    """
    machine, lengths = planner.machine, planner.lengths
    shared = (
        f", models divided by {machine.sharding.kind}" if machine.sharding.kind != "none" else ""
    )
    lines = [
        f"{recipe.name} on {machine.processes} process(es), {machine.name}{shared}",
        "",
        "Memory of one process on its device in GB, at the moment of its stage that takes most:",
        *_table(
            [COLUMNS, *(_row(need) for need in needs)], last=[need.peak.moment for need in needs]
        ),
        "",
        "Time, estimated, without loading, communication, validation and saving,",
        f"{_lengths(lengths)}:",
        *(_time(need) for need in needs),
    ]
    for need in needs:
        if need.roles:
            lines += ["", "The four roles of ppo, GB before they are divided:", *_roles(need)]
    lines += ["", *(f"{SIGNS[found.state]}  {found.text}" for found in findings)]
    lines += [f"{SIGNS['wrong']}  {stage} does not fit; {what}" for stage, what in mending.items()]
    return "\n".join(lines)


def _lengths(lengths: Lengths) -> str:
    if lengths == UNKNOWN:
        return "with every row as long as it may be (make tokenizer, and its rows are looked at)"
    means = {**lengths.rows, "prompts": lengths.prompt, "replies": lengths.reply}
    told = ", ".join(f"{name} {tokens:.0f}" for name, tokens in means.items() if tokens)
    return f"with the run's rows (mean tokens: {told})"


def _row(need: Need) -> tuple[str, ...]:
    peak = need.peak
    sizes = (peak.weights, peak.gradients, peak.optimizer, peak.working, need.base, need.total)
    fits = "yes" if need.fits else "NO"
    return (need.stage, *(f"{size / GB:.2f}" for size in (*sizes, need.room)), fits)


def _table(rows: Sequence[Sequence[str]], *, last: Sequence[str] = ()) -> list[str]:
    """Returns rows with columns as wide as needed, and words behind those below the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = ["at", *last] if last else [""] * len(rows)
    return [
        "  ".join(
            [
                cell.ljust(width) if index == 0 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            + ([word] if word else [])
        )
        for row, word in zip(rows, words, strict=True)
    ]


def _time(need: Need) -> str:
    whole = f", {need.units} of them {_span(need.units * need.seconds)}" if need.units > 1 else ""
    each = "an" if need.unit == "update" else "a"
    return f"{need.stage}: {_span(need.seconds)} {each} {need.unit}{whole}"


def _span(seconds: float) -> str:
    """Returns a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _roles(need: Need) -> list[str]:
    rows: list[tuple[str, ...]] = [("role", "weights", "gradients", "optimizer")]
    for name, role in need.roles.items():
        sizes = (role.weights, role.trained, 2 * role.trained)  # AdamW's two moments
        rows.append((name, *(f"{size / GB:.2f}" for size in sizes)))
    return _table(rows)
