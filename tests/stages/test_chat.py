"""The chat: piped lines, history, two models side by side, refusals."""

import os
import re
import subprocess
import sys

import pytest

from pipeline.errors import UserError
from stages.chat import Config, Speaker, columns, converse, load, main, parse
from tests.evaluation.fakes import save_language_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return [str(save_language_model(base / f"model-{seed}", seed=seed)) for seed in (1, 2)]


def config(*models, **settings):
    return Config(models=tuple(models), max_response_tokens=6, **settings)


def talk(speakers, *lines, settings):
    written = []
    converse(speakers, lines=lines, write=written.append, config=settings)
    return "".join(written)


def test_history_alternates_and_quit_leaves(folders):
    settings = config(folders[0])
    (speaker,) = load(settings)
    talk([speaker], "love you\n", "\n", "play music\n", "/quit\n", "never\n", settings=settings)
    assert [m["role"] for m in speaker.history] == ["user", "assistant", "user", "assistant"]
    assert [m["content"] for m in speaker.history][::2] == ["love you", "play music"]


def test_new_forgets_the_conversation(folders):
    settings = config(folders[0])
    (speaker,) = load(settings)
    talk([speaker], "love you", "/new", "play music", settings=settings)
    assert [m["content"] for m in speaker.history][::2] == ["play music"]


def test_the_reply_depends_on_what_was_said_before(folders):
    settings = config(folders[0])
    first, second = load(settings) + load(settings)
    first.answer("what a great day", config=settings, turn=0)
    assert first.answer("music", config=settings, turn=1)
    second.answer("no no bad", config=settings, turn=0)
    second.answer("music", config=settings, turn=1)
    assert first.history != second.history


def test_the_oldest_exchanges_go_when_the_context_is_full(folders):
    settings = config(folders[0])
    (speaker,) = load(settings)
    for turn in range(12):
        speaker.answer("what a great day it was", config=settings, turn=turn)
    assert 2 <= len(speaker.history) < 24
    assert speaker.history[0]["role"] == "user"


def test_a_message_beyond_the_context_is_told_and_nothing_is_forgotten(folders):
    settings = config(folders[0])
    (speaker,) = load(settings)
    told = speaker.answer("x " * 80, config=settings, turn=0)
    assert re.search(r"takes \d+ tokens and a reply up to 6, and this model reads \d+", told)
    assert speaker.history == []
    speaker.answer("love you", config=settings, turn=1)
    before = list(speaker.history)
    assert "too long" in speaker.answer("x " * 80, config=settings, turn=2)
    assert speaker.history == before != []


def test_two_models_answer_side_by_side(folders):
    settings = config(*folders)
    shown = talk(load(settings), "love you", settings=settings)
    assert shown.count("|") >= 2
    assert [len(s.history) for s in load(settings)] == [0, 0]


def test_columns_wrap_to_the_width():
    lines = columns(["a b c d", "e"], width=11).splitlines()
    assert lines == ["a b  |  e", "c d  |"]
    assert columns(["one two"], width=3) == "one\ntwo"
    assert columns([""], width=10) == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--models", "a", "b", "c"], "one or two folders, got 3"),
        (["--models", "a", "--temperature", "0"], "--temperature: must be above 0"),
        (["--models", "a", "--max_response_tokens", "0"], "must be at least 1, got 0"),
        ([], "--models"),
        (["--models", "a", "--what"], "--what"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, told):
    with pytest.raises(UserError, match=told):
        parse(words)


def test_bad_folders_are_one_line_and_exit_code_two(tmp_path, caplog):
    assert main(["--models", str(tmp_path / "none")]) == 2
    assert "no folder of a causal language model" in caplog.records[-1].getMessage()


def test_a_model_without_a_template_cannot_chat(tmp_path):
    folder = str(save_language_model(tmp_path, template=False))
    with pytest.raises(UserError, match="no chat template, so it cannot chat"):
        load(config(folder))


def test_piped_lines_are_a_chat(folders):
    words = [sys.executable, "-m", "stages.chat", "--models", *folders, "--temperature=0.5"]
    done = subprocess.run(
        words, input="love you\n/quit\n", capture_output=True, text=True, check=True
    )
    assert done.stdout.count("> ") == 2


def test_what_the_terminal_cannot_read_or_show_ends_nothing(folders):
    words = [sys.executable, "-m", "stages.chat", "--models", folders[0]]
    lines = b"love \xff\xfe you\nplay\n"
    surroundings = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(words, input=lines, capture_output=True, env=surroundings, check=True)
    assert done.stdout.count(b"> ") == 3


def test_a_reader_that_leaves_ends_the_chat_quietly(folders):
    words = [sys.executable, "-m", "stages.chat", "--models", folders[0]]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        words, input=b"love you\n", stdout=writing, stderr=subprocess.PIPE, check=True
    )
    os.close(writing)
    assert done.stderr == b""


def test_help_loads_nothing_heavy():
    program = (
        "import sys\nfrom stages.chat import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip().endswith("set()")
    assert "--temperature" in done.stdout


def test_a_speaker_starts_without_history():
    assert Speaker(name="x", model=None, tokenizer=None).history == []
