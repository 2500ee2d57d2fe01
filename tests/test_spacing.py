"""Rows at even distances."""

import pytest

from pipeline.spacing import evenly_spaced


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (10, 3, [0, 3, 6]),
        (10, 4, [0, 2, 5, 7]),
        (3, 3, [0, 1, 2]),
        (3, 8, [0, 1, 2]),
        (0, 4, []),
        (4, 0, []),
    ],
)
def test_rows_at_even_distances(total, count, expected):
    assert evenly_spaced(total, count) == expected
