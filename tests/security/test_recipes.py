"""A recipe and a command line hold values: reading them imports, makes and calls nothing."""

import sys

import pytest

from pipeline.config import load
from pipeline.errors import UserError
from stages import ppo, pretrain

MODULE = """
from pathlib import Path
Path({mark!r}).touch()

class Thing:
    def __init__(self, a: int = 1) -> None:
        Path({mark!r}).touch()
"""


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that a planted module makes when it is imported; it must not be there at the end."""
    path = tmp_path / "it-ran"
    (tmp_path / "planted.py").write_text(MODULE.format(mark=str(path)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield path
    assert not path.exists()
    assert "planted" not in sys.modules


def read(tmp_path, text: str, *words: str, stage=pretrain):
    """The configuration of a recipe with this text."""
    name = stage.__name__.removeprefix("stages.")
    path = tmp_path / "configs" / "cpu" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return load(stage.Config, list(words), stage=name)


CALLS = [
    "!!python/object/apply:os.mkdir ['it-ran']",
    "!!python/object/new:os.mkdir ['it-ran']",
    "!!python/name:planted.Thing",
    "!!python/module:planted",
    "!!python/object:planted.Thing {}",
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("key", ["seed", "init_from", "architecture", "unknown"])
def test_yaml_calls_nothing(tmp_path, mark, call, key):
    with pytest.raises(UserError, match="command line: ") as caught:
        read(tmp_path, f"{key}: {call}\n")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("key", ["seed", "architecture", "architecture.options", "training"])
def test_words_call_nothing(tmp_path, mark, call, key):
    with pytest.raises(UserError, match="command line: "):
        read(tmp_path, "seed: 1\n", f"--{key}={call}")


THING = '{"class_path": "planted.Thing", "init_args": {"a": 2}}'


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        (pretrain, f"architecture={THING}"),
        (pretrain, f"training={THING}"),
        (ppo, f"kl={THING}"),
        (ppo, f"reward.sources=[{THING}]"),
    ],
)
def test_a_class_path_imports_nothing(tmp_path, mark, stage, setting):
    key, _, value = setting.partition("=")
    outer, _, inner = key.partition(".")
    nested = f"{outer}:\n  {inner}: {value}\n" if inner else f"{outer}: {value}\n"
    for text, words in ((nested, []), ("seed: 1\n", [f"--{setting}"])):
        with pytest.raises(UserError, match="command line: "):
            read(tmp_path, text, *words, stage=stage)


@pytest.mark.parametrize("place", ["options: {x: %s}", "options: %s", "options: {x: [%s]}"])
def test_a_class_path_in_a_free_field_stays_a_value(tmp_path, mark, place):
    config = read(tmp_path, f"architecture:\n  {place % THING}\n")
    assert "planted.Thing" in str(config.architecture.options)
    config = read(tmp_path, "seed: 1\n", "--architecture={%s}" % (place % THING))
    assert "planted.Thing" in str(config.architecture.options)
