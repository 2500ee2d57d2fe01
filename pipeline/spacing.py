"""Some of many, at even distances: what a look at part of a split reads."""


def evenly_spaced(total: int, count: int) -> list[int]:
    """Returns at most `count` indices below `total`, from 0 on; all of them where count is more."""
    count = min(count, total)
    return [index * total // count for index in range(count)]
