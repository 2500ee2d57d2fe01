"""Whatever a model, a row or a file's name holds, nothing that steers it reaches the terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.terminal import printable
from stages.chat import Config, Speaker, columns, converse

STEERING = {
    "escape": "\x1b[2J\x1b]0;title\x07",
    "carriage return": "\r",
    "backspace": "\b",
    "C1 control": "\x9b31m\x85",
    "form feed": "\x0b\x0c\x1c\x1f",
    "direction": "\u202e\u2066",
    "NUL": "\0",
}


@pytest.mark.parametrize("signs", STEERING.values(), ids=STEERING)
def test_what_steers_becomes_a_question_mark(signs):
    shown = printable(f"a{signs}b\tc\né")
    assert shown[0] == "a"
    assert shown.endswith("b\tc\né")
    assert not [sign for sign in shown if not sign.isprintable() and sign not in "\t\n"]


class Parrot(Speaker):
    """Says its own name, whatever it is asked."""

    def answer(self, text, **_):
        return self.name


@pytest.mark.parametrize("signs", STEERING.values(), ids=STEERING)
def test_a_reply_and_a_folders_name_in_the_chat(signs):
    written: list[str] = []
    config = Config(models=("a", "b"))
    names = (f"models/{signs}", "harmless")
    speakers = [Parrot(name=name, model=None, tokenizer=None) for name in names]
    converse(speakers, lines=["hello\n", "/quit\n"], write=written.append, config=config)
    shown = "".join(written)
    assert shown.count("harmless") == 2
    assert not [sign for sign in shown if not sign.isprintable() and sign != "\n"]
    assert columns([signs + "x"], width=40).endswith("x")


PROGRAM = """
import logging, sys
from pipeline.command import command
from pipeline.config import StageConfig
from pipeline.errors import UserError

evil = "a\\x1b[31mb\\rc\\x9b"

def run(config):
    logging.getLogger("stages.toy").info("toy: %s -> %s", evil, config.run)
    logging.getLogger("somebody.else").warning(evil)
    raise UserError(f"row 3: {evil}")

sys.exit(command(StageConfig, run, [f"--run={evil}"], stage="toy"))
"""


def test_every_line_of_the_log(tmp_path):
    recipe = tmp_path / "configs" / "cpu" / "toy.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("seed: 1\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.decode().splitlines()
    assert lines == [
        "toy: a?[31mb?c? -> a?[31mb?c?",
        "a?[31mb?c?",
        "toy: row 3: a\\x1b[31mb c\\x9b",  # a user's mistake is one line, its signs spelt out
    ]
