"""Files of prompts for generation in bulk: replies to all of them, or one line and no file."""

import json
import logging
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stages.evaluate
from tests.evaluation.fakes import save_language_model
from tests.fuzz.support import as_json, assert_clear, damaged, damaged_bytes, fuzz, texts, values

ROWS = (
    {"prompt": "what a great day"},
    {"prompt": [{"role": "assistant", "content": "yes?"}, {"role": "user", "content": "music"}]},
    {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]},
)


@pytest.fixture(scope="module", autouse=True)
def checkout(tmp_path_factory):
    """A checkout with a model that replies."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree("configs/smoke", folder / "configs" / "smoke")
    save_language_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def generate(folder, caplog, name: str, content: bytes, *words: str) -> int:
    """Generates as from the command line; checks what is said and what is left."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    (folder / name).write_bytes(content)
    output = folder / "replies.jsonl"
    output.unlink(missing_ok=True)
    asked = ["--generate.model=model", f"--generate.prompts={name}"]
    asked += ["--generate.output=replies.jsonl", "--generate.max_response_tokens=3"]
    code = stages.evaluate.main(["--recipe=smoke", *asked, *words])
    if code:
        assert code == 2
        assert_clear(caplog.records[-1].getMessage())
        assert not output.exists()
    else:
        rows = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
        assert rows
        assert all(set(row) == {"prompt", "response", "ended"} for row in rows)
    assert (folder / name).read_bytes() == content
    return code


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
@fuzz(6, share=0.3)
@given(data=st.data())
def test_a_damaged_file_is_answered_or_told(checkout, caplog, name, data):
    rows = st.sampled_from(ROWS)
    lines = data.draw(st.lists(rows | rows.flatmap(damaged) | values, min_size=1, max_size=3))
    content = b"\n".join(map(as_json, lines))
    generate(checkout, caplog, name, data.draw(st.just(content) | damaged_bytes(content)))


@fuzz(6, share=0.3)
@given(lines=st.lists(texts, max_size=3))
def test_lines_of_any_text_are_answered_or_told(checkout, caplog, lines):
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    generate(checkout, caplog, "prompts.txt", content)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--generate.output=prompts.txt",), "generate.output: would replace"),
        (("--generate.output=model",), "generate.output: model is a folder"),
        (("--generate.output=model/config.json/x",), r"cannot be written (File exists)"),
        (("--generate.output=" + "x" * 300,), "the name is too long"),
        (("--generate.prompts=model",), "no such file: model"),
        (("--generate.model=nowhere",), "nowhere is no folder"),
        (("--generate.max_response_tokens=2000000000",), "exceed the model's context"),
    ],
)
def test_places_that_cannot_be(checkout, caplog, words, message):
    assert generate(checkout, caplog, "prompts.txt", b"hello", *words) == 2
    assert message in caplog.records[-1].getMessage()
    assert (checkout / "model" / "config.json").is_file()
