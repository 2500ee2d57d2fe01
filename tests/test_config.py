"""Configuration: defaults, YAML, command line, and one clear line for every mistake."""

from dataclasses import dataclass, field

import pytest

from pipeline.config import StageConfig, load, overrides, portable, require
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A nested group."""

    coef: float = 0.5
    """Coefficient."""

    def __post_init__(self) -> None:
        require(self.coef >= 0, f"inner.coef: must be at least 0, got {self.coef}")


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """A stage's settings."""

    size: int = 4
    """Some size."""
    inner: Inner = field(default_factory=Inner)
    """The nested group."""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A checkout with one recipe; returns a writer of its YAML."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "configs" / "cpu" / "toy.yaml"
    path.parent.mkdir(parents=True)

    def write(text: str) -> None:
        path.write_text(text, encoding="utf-8")

    write("size: 7\n")
    return write


def test_yaml_overrides_defaults_and_words_override_yaml(recipe):
    recipe("size: 7\ninner:\n  coef: 2.0e-1\n")
    config = load(Config, ["--inner.coef=0.3", "--seed", "5"], stage="toy")
    assert (config.size, config.inner.coef, config.seed) == (7, 0.3, 5)
    assert config.overrides == ("inner.coef=0.3", "seed=5")


def test_circumstances_are_no_overrides_and_no_content(recipe):
    words = ["--run=elsewhere", "--force=true", "--num_processes=2", "--size=9"]
    assert overrides(words) == ("size=9",)
    content = load(Config, words, stage="toy").content()
    assert content["size"] == 9
    assert not {"run", "recipe", "force", "num_processes", "tracking", "overrides"} & set(content)


@pytest.mark.parametrize(
    ("yaml", "words", "message"),
    [
        ("size: 7\n", ["--sise=3"], "unrecognized arguments: --sise=3"),
        ("sise: 7\n", [], "sise"),
        ("size: many\n", [], "size.*Expected a <class 'int'>"),
        ("size: 7\n", ["--inner.coef=-1"], "inner.coef: must be at least 0, got -1.0"),
        ("inner:\n  coef: -1.0\n", [], "inner.coef: must be at least 0, got -1.0"),
        ("size: [1\n", [], "toy.yaml"),
        ("size: 7\n", ["--seed=-1"], "seed: must be at least 0, got -1"),
        ("size: 7\n", ["--threads=-1"], "threads: must be at least 0, got -1"),
        ("size: 7\n", ["--num_processes=0"], "num_processes: must be at least 1, got 0"),
        (
            "size: 7\n",
            ["--tracking=paper"],
            "tracking: must be none or some of auto, wandb, trackio, tensorboard, got 'paper'",
        ),
        ("size: 7\n", ["--tracking=auto,wandb"], "tracking: must be none or some of auto, wandb"),
        ("size: 7\n", ["--recipe=nowhere"], "no configuration configs/nowhere/toy.yaml.*cpu"),
    ],
)
def test_a_mistake_is_one_line(recipe, yaml, words, message):
    recipe(yaml)
    with pytest.raises(UserError, match=message) as caught:
        load(Config, words, stage="toy")
    assert "\n" not in str(caught.value)


def test_help_lists_every_field_with_its_docstring(recipe, capsys):
    with pytest.raises(SystemExit, match="0"):
        load(Config, ["--help"], stage="toy")
    printed = capsys.readouterr().out
    assert __doc__.strip() in printed
    text = " ".join(printed.split())
    assert "Some size. (type: int, default: 7)" in text
    assert "--inner.coef COEF Coefficient." in text


def test_absolute_paths_are_recorded_by_their_last_name():
    setting = {"path": "/home/me/rows.jsonl", "sources": [{"model": "/models/judge"}], "size": 7}
    assert portable(setting) == {
        "path": "rows.jsonl",
        "sources": [{"model": "judge"}],
        "size": 7,
    }
    assert portable(("my/rows.jsonl", "owner/name")) == ("my/rows.jsonl", "owner/name")
