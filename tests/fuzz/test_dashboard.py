"""The dashboard over a run in which any file may hold anything: it answers, in plain JSON."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dashboard.server import answer
from pipeline.dashboard.views import Views
from tests.dashboard.runs import finished, held, trained
from tests.fuzz.support import as_json, fuzz, values

FILES = (
    "ppo/metrics.jsonl", "ppo/timings.jsonl", "ppo/samples.jsonl", "ppo/manifest.json",
    "sft/checkpoints/step-2/point.json", "sft/metrics.jsonl", ".sft.lock", "evaluate/manifest.json",
)  # fmt: skip
QUESTIONS = (
    "/api/runs", "/api/run?run=a", "/api/curves?run=a&stage=ppo", "/api/curves?run=a&stage=sft",
    "/api/samples?run=a&stage=ppo", "/api/compare?run=a&stage=sft", "/api/compare?run=a&stage=ppo",
)  # fmt: skip


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """The views of one run, whose files tests may change."""
    root = tmp_path_factory.mktemp("runs")
    finished(root / "a" / "evaluate")
    trained(finished(root / "a" / "ppo"), steps=3, of=3)
    trained(root / "a" / "sft", steps=2, of=9)
    (root / "a" / "sft" / "checkpoints" / "step-2").mkdir(parents=True)
    held(root / "a" / "sft", since=2e9)
    return Views(root)


@st.composite
def contents(draw):
    """Bytes of a file: rows with anything in them, whole or cut, or no rows at all."""
    rows = st.fixed_dictionaries(
        {"step": values, "of": values, "at": values, "pid": values, "config": values},
        optional={"host": values, "since": values, "content": values, "circumstances": values},
    )
    line = rows.map(as_json) | values.map(as_json) | st.binary(max_size=30)
    lines = draw(st.lists(line, max_size=4))
    whole = b"\n".join(lines) + draw(st.sampled_from([b"", b"\n"]))
    return whole[: draw(st.integers(0, len(whole)))] if draw(st.booleans()) else whole


@fuzz(10)
@given(name=st.sampled_from(FILES), content=contents())
def test_every_question_is_answered(views, name, content):
    file = Path(views.runs.root) / "a" / name
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    try:
        for question in QUESTIONS:
            told = answer(views, question)
            assert told.status == 200, told.body
            json.loads(told.body, parse_constant=pytest.fail)
    finally:
        file.unlink()
        if before is not None:
            file.write_bytes(before)


@fuzz(25)
@given(path=st.text(max_size=40) | st.text("/.?&=%#ab0", max_size=40))
def test_every_address_is_answered(views, path):
    for start in ("", "/", "/api/run?run=", "/report/", "/api/samples?run=a&stage=ppo&step="):
        told = answer(views, start + path)
        assert told.status in (200, 400, 404)
        if told.status != 200:
            assert told.kind == "text/plain"
