"""Configurations with anything in any place: a whole, well-typed configuration, or one line."""

import dataclasses
import functools
import importlib
import itertools
import json
import shutil
import time
import typing

import pytest
import yaml
from beartype.door import is_bearable
from hypothesis import given
from hypothesis import strategies as st

import pipeline.config
from pipeline.config import load
from pipeline.errors import UserError
from pipeline.storage import digest_of, plain
from tests.fuzz.support import (
    ODD_TEXTS,
    assert_clear,
    damaged,
    damaged_bytes,
    fuzz,
    one_line,
    paths_of,
    texts,
)

STAGES = ("data", "tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate", "report", "seeds")
CLASSES = {stage: importlib.import_module(f"stages.{stage}").Config for stage in STAGES}
SMOKE = "--recipe=smoke"
QUICK = 10.0
"""Seconds of the processor in which the worst YAML file is read or refused; a bomb takes hours."""


@pytest.fixture(scope="module", autouse=True)
def checkout(tmp_path_factory):
    """A checkout of which only the recipe smoke is left; returns its folder."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree("configs/smoke", folder / "configs" / "smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(
            "pipeline.config._parser", functools.cache(pipeline.config._parser)
        )  # most of the time
        yield folder / "configs" / "smoke"


@pytest.fixture(scope="module")
def documents(checkout):
    """Every stage's whole configuration as plain values."""
    loaded = {stage: load(CLASSES[stage], [SMOKE], stage=stage) for stage in STAGES}
    made = {
        stage: json.loads(json.dumps(config, default=plain)) for stage, config in loaded.items()
    }
    for document in made.values():
        del document["overrides"], document["recipe"]
    return made


def load_text(checkout, stage: str, content: bytes | str, *words: str):
    """Loads a stage's configuration from a file of that content."""
    path = checkout / f"{stage}.yaml"
    whole = path.read_bytes()
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    try:
        config = one_line(lambda: load(CLASSES[stage], [SMOKE, *words], stage=stage))
        if config is not None:
            assert_whole(config)
        return config
    finally:
        path.write_bytes(whole)


def assert_whole(config) -> None:
    """Every field has its type, and the manifest can hold and repeat all of it."""
    content = json.dumps(config.content(), allow_nan=False, ensure_ascii=False, default=plain)
    assert digest_of(json.loads(content)) == digest_of(config.content())
    content.encode()
    assert_typed(config)


def assert_typed(group) -> None:
    hints = typing.get_type_hints(type(group))
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        assert is_bearable(value, hints[field.name]), (field.name, value)
        assert "\0" not in str(value)
        if dataclasses.is_dataclass(value):
            assert_typed(value)


@pytest.mark.parametrize("stage", STAGES)
@fuzz(4, share=0.2)
@given(data=st.data())
def test_yaml_with_anything_in_any_place(stage, checkout, documents, data):
    document = data.draw(damaged(documents[stage]))
    load_text(
        checkout,
        stage,
        yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass"),
    )


@pytest.mark.parametrize("stage", STAGES)
@fuzz(4, share=0.2)
@given(data=st.data())
def test_overrides_of_anything(stage, checkout, documents, data):
    keys = [".".join(map(str, path)) for path in paths_of(documents[stage])[1:]]
    key = st.sampled_from(keys) | st.sampled_from(("", "no_such", "help", "seed.x", "config"))
    words = data.draw(
        st.lists(
            st.builds("--{}={}".format, key, texts) | st.builds("--{}".format, key) | texts,
            max_size=3,
        )
    )
    words = [word for word in words if "\0" not in word and not word.startswith(("-h", "--help"))]
    config = one_line(lambda: load(CLASSES[stage], [SMOKE, *words], stage=stage))
    if config is not None:
        assert_whole(config)


@pytest.mark.parametrize("stage", ["ppo", "sft"])
@fuzz(10, share=0.5)
@given(data=st.data())
def test_damaged_yaml(stage, checkout, data):
    load_text(checkout, stage, data.draw(damaged_bytes((checkout / f"{stage}.yaml").read_bytes())))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        "---\n",
        "null\n",
        "- a\n- b\n",
        "3\n",
        "text\n",
        "seed\n",
        "? {a: b}\n: c\n",
        "!!python/object/apply:os.getcwd []\n",
        "seed: !!python/name:os.getcwd\n",
        "seed: 1\nseed: 2\n",
        "kl: {coef: 0.1, coef: 0.2}\n",
        "seed: &x [*x]\n",
        "kl: &k\n  <<: *k\n",
        "kl: &k {coef: 0.1}\nseed: 3\n",
        "%YAML 9.9\n---\nseed: 1\n",
        "seed: 1\n---\nseed: 2\n",
        "\ufeffseed: 1\n",
        "seed: 1\r\nthreads: 1\r\n",
        "seed: 1\rthreads: 1",
        "\tseed: 1\n",
        BOMB,
        BOMB.replace("a: &a", "targets: &a"),
        "seed: " + "[" * 20000,
        "seed: " + "{a: " * 3000,
        "a" * 100000,
        "1: 2\n",
        "null: 1\n",
        "true: 1\n",
        "[1, 2]: 3\n",
        "seed: 2001-01-01\n",
        "seed: 0o17\n",
        "seed: 1_000\n",
        "seed: 190:20:30\n",
        "seed: 0x1f\n",
        "seed: " + "9" * 5000,
        "threads: .inf\n",
        "=: 1\n",
        b"\xff\xfes\0e\0e\0d\0",
        b"seed: \xff\n",
        b"seed: 1\0",
        b"\x1f\x8b\x08",
    ],
    ids=lambda content: ascii(content)[:30],
)
def test_strange_yaml_is_read_or_refused_at_once(content, checkout):
    started = time.process_time()
    load_text(checkout, "evaluate", content)
    assert time.process_time() - started < QUICK


@pytest.mark.parametrize("text", ODD_TEXTS, ids=lambda text: ascii(text)[:20])
def test_odd_names_of_recipes_and_runs(text, checkout):
    for words in ([f"--recipe={text}"], [SMOKE, f"--run={text}"]):
        try:
            assert_whole(load(CLASSES["data"], words, stage="data"))
        except UserError as error:
            assert_clear(str(error))
