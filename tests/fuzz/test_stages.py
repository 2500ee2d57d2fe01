"""The data stage on rows and settings of every kind: finished, or one line and all as it was."""

import logging
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stages.data
from pipeline.checkpoint import open_artifact
from tests.fuzz.support import as_json, assert_clear, damaged, fuzz
from tests.fuzz.test_rows import GOOD_ROWS

SMALL = (
    "--recipe=smoke", "--run=run", "--chats.synthetic_conversations=6",
    "--ratings.synthetic_texts=20", "--ratings.ranking_size=4",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def checkout(tmp_path_factory):
    """A checkout with the recipe smoke and no run."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree("configs/smoke", folder / "configs" / "smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def make_data(checkout, caplog, *words: str) -> int:
    """Runs the stage as `make data FORCE=1` does; checks what it says and what it leaves."""
    folder = checkout / "run" / "data"
    before = files_in(folder)
    caplog.clear()
    code = stages.data.main([*SMALL, "--force=true", *words])
    said = [record.getMessage() for record in caplog.records if record.name.startswith("stages")]
    if code:
        assert code == 2
        (line,) = said
        assert_clear(line)
        assert line.startswith("data: ")
        assert files_in(folder) == before
    else:
        open_artifact(folder, kind="dataset")
    left = {path.name for path in folder.parent.iterdir()} if folder.parent.is_dir() else set()
    assert left <= {"data", ".data.lock"}
    return code


@fuzz(8, share=0.3)
@given(data=st.data())
def test_own_rows_of_any_type(checkout, caplog, data):
    caplog.set_level(logging.INFO)
    words = ["--chats.source=" + data.draw(st.sampled_from(("none", "synthetic")))]
    words += ["--ratings.source=" + data.draw(st.sampled_from(("none", "synthetic")))]
    for row_type in data.draw(st.sets(st.sampled_from(list(GOOD_ROWS)), min_size=1, max_size=3)):
        rows = st.sampled_from(GOOD_ROWS[row_type])
        drawn = data.draw(st.lists(rows | rows | rows.flatmap(damaged), min_size=1, max_size=5))
        (checkout / f"{row_type}.jsonl").write_bytes(
            b"".join(as_json(row) + b"\n" for row in drawn)
        )
        words.append(f"--{row_type}.path={row_type}.jsonl")
    make_data(checkout, caplog, *words)


@fuzz(4, share=0.1)
@given(
    chats=st.fixed_dictionaries(
        {},
        optional={
            "min_turns": st.integers(0, 12),
            "min_words": st.integers(0, 30),
            "max_words": st.integers(0, 30),
            "context_turns": st.integers(0, 4),
            "synthetic_conversations": st.integers(0, 6),
        },
    ),
    ratings=st.fixed_dictionaries(
        {},
        optional={
            "ranking_size": st.integers(0, 30),
            "max_prompt_words": st.integers(-1, 6),
            "sets": st.sampled_from(("[]", "[tweets]", "[tweets,tweets]", "[x]", "tweets", "{}")),
            "guard_sets": st.sampled_from(("[]", "[tweets]", "[nytEditorialSnippets]")),
            "split": st.sampled_from(("{validation_frac: 0.4, test_frac: 0.4}", "{}", "null")),
        },
    ),
)
def test_any_settings_within_reach(checkout, caplog, chats, ratings):
    caplog.set_level(logging.INFO)
    words = [f"--chats.{name}={value}" for name, value in chats.items()]
    words += [f"--ratings.{name}={value}" for name, value in ratings.items()]
    make_data(checkout, caplog, *words)
