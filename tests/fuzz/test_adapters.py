"""Foreign rows of every schema with anything in any place: rows come of them, or one line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.adapters.reading import ADAPTERS
from pipeline.data.files import OwnRows
from pipeline.data.formats import read_rows
from tests.data.adapters import foreign, test_oasst
from tests.data.own import read_own, write_rows
from tests.fuzz.support import as_json, damaged, fuzz, one_line

GOOD = {schema: foreign.documents(schema, count=2, seed=1) for schema in ADAPTERS}
GOOD["oasst"] = [*GOOD["oasst"][:6], test_oasst.good()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("schema", ADAPTERS)
@fuzz(40)
@given(data=st.data())
def test_damaged_rows_give_rows_or_one_line(schema, folder, data):
    rows = st.sampled_from(GOOD[schema])
    drawn = [*GOOD[schema], *data.draw(st.lists(rows.flatmap(damaged), min_size=1, max_size=3))]
    path = folder / "foreign.jsonl"
    path.write_bytes(b"".join(as_json(row) + b"\n" for row in drawn))
    row_type = data.draw(st.sampled_from(ADAPTERS[schema].gives))
    languages = data.draw(st.sampled_from(((), ("en",)))) if ADAPTERS[schema].language else ()
    own = OwnRows(path=str(path), schema=schema, languages=languages)
    given_rows = one_line(lambda: read_own(own, row_type))
    if given_rows is not None:
        made, source = given_rows
        json.dumps(source.as_json()).encode()
        write_rows(folder, row_type, split="train", rows=made)
        assert read_rows(folder, row_type, split="train") == made
