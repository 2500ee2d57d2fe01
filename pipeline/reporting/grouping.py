"""Which metrics share a chart, on the report's page and on the dashboard alike."""

from collections import defaultdict
from collections.abc import Iterable

OVERLAID = ("train", "validation")
"""Groups whose figures of one name share a chart."""


def grouped(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns the charts of some metrics: by title, each line's metric by its label.

    Training and validation share a chart; a metric that is alone in one keeps its full name.
    """
    together: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        group, _, figure = name.partition("/")
        together[figure if group in OVERLAID else name][group] = name
    return {
        title if len(parts) > 1 else next(iter(parts.values())): parts
        for title, parts in together.items()
    }
