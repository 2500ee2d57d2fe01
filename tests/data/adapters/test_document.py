"""The examples of docs/own-data.md are what the adapters give, and it names every schema."""

import json
import re
from pathlib import Path

import pytest

from pipeline.data.adapters.reading import ADAPTERS
from tests.data.adapters.support import read

DOCUMENT = Path("docs/own-data.md").read_text()
EXAMPLES = re.findall(
    r"```json (\w+)\n(.*?)\n```\n+```json (\w+)\n(.*?)\n```", DOCUMENT, flags=re.DOTALL
)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example[0])
def test_an_example_gives_the_row_below_it(tmp_path, example):
    schema, foreign, row_type, ours = example
    rows, dropped = read(tmp_path, [json.loads(foreign)], schema, row_type)
    assert rows == [json.loads(ours)]
    assert not dropped


def test_every_schema_has_an_example():
    assert {schema for schema, *_ in EXAMPLES} == set(ADAPTERS)
