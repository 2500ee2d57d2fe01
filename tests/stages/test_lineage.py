"""The command that prints a run's chain: what it says of good, altered, stale, absent folders."""

import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import origin
from pipeline.checkpoint import begin, open_artifact
from pipeline.config import load
from pipeline.data.packages import Package
from pipeline.origin import outside_parents
from pipeline.storage import sealed, write_json
from stages.lineage import main
from tests.test_lineage import CHAIN, flip

SOURCE = {"origin": "PyPI: some-chats some_chats-1.0.whl", "version": "1.0", "licence": "MIT"}
SOURCE |= {"sha256": hashlib.sha256(b"chats").hexdigest(), "rows": {}, "dropped": {}}
KINDS = {stage: kind for stage, (kind, _) in CHAIN.items()} | {"reward_guard": "reward"}

LOADED = {}
"""Configurations by what they were read from: the parser takes longer than all else here."""


def quick_load(config_class, words, *, stage):
    """The configuration of a stage, read once for the same words and the same YAML."""
    yaml = Path("configs/smoke", f"{stage}.yaml").read_bytes()
    key = (config_class, *(word for word in words if not word.startswith("--run=")), yaml)
    if key not in LOADED:
        LOADED[key] = load(config_class, words, stage=stage)
    run = next(word.removeprefix("--run=") for word in words if word.startswith("--run="))
    return dataclasses.replace(LOADED[key], run=run)


def make(stage: str, *words: str, run: str = "runs/smoke", text: str = "") -> None:
    """Finishes a stage's folder in the recipe's own settings, without its work."""
    config_class = importlib.import_module(f"stages.{stage}").Config
    config = quick_load(config_class, ["--recipe=smoke", f"--run={run}", *words], stage=stage)
    names = CHAIN.get(stage, ("reward", ("data", "sft")))[1]
    parents = {name: open_artifact(Path(run) / name, kind=KINDS[name]) for name in names}
    if stage != "ppo":
        parents |= outside_parents(config, stage)
    with begin(config, stage=stage, kind=KINDS[stage], parents=parents) as made:
        (made.path / "weights").write_text(f"weights of {stage} {text}")
        if stage == "data":
            write_json(made.path / "sources.json", [SOURCE])
        made.finish("done", chosen={}, summary={}, card="# Card")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A checkout with the smoke recipe and a finished run of it."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree("configs", folder / "configs")
    for yaml in (folder / "configs").glob("*/*.yaml"):
        os.utime(yaml, (1, 1))
    before = Path.cwd()
    os.chdir(folder)
    try:
        for stage in CHAIN:
            make(stage)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def checkout(finished, tmp_path, monkeypatch):
    """A copy of it to work in; the files keep their times."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "checkout"))
    monkeypatch.setattr("stages.lineage.load", quick_load)
    return Path.cwd()


@pytest.fixture
def lineage(checkout, capsys):
    """Runs the command; returns its exit code, and what it wrote."""

    def call(*words: str) -> tuple[int, str]:
        code = main(["--recipe=smoke", *words])
        return code, capsys.readouterr().out

    return call


def told_of(text: str, stage: str) -> str:
    """The lines of one folder."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split(" ")[0] == stage)
    rest = [line for line in lines[start + 1 :] if line]
    end = next(i for i, line in enumerate(rest) if not line.startswith(" "))
    return " ".join(" ".join([lines[start], *rest[:end]]).split())


def test_a_whole_run_is_good_from_its_sources_to_the_report(lineage):
    code, text = lineage()
    assert code == 0
    assert text.startswith("Lineage of runs/smoke, held against configs/smoke\n")
    for value in ("origin", "version", "licence", "sha256"):
        assert SOURCE[value] in text
    for stage, (kind, parents) in CHAIN.items():
        told = told_of(text, stage)
        digest = open_artifact(Path("runs/smoke") / stage, kind=kind).digest[:12]
        assert told.startswith(f"{stage} good {kind} {digest} 20")
        for name in parents:
            parent = open_artifact(Path("runs/smoke") / name, kind=KINDS[name]).digest[:12]
            assert f"from {name} recorded {parent} found {parent}" in told
    assert "8 folders, " in text
    assert text.rstrip().endswith("MiB: all good")
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text


def test_it_makes_no_folder_and_changes_none(checkout, lineage):
    before = sorted((path, path.stat().st_mtime_ns) for path in checkout.rglob("*"))
    lineage()
    lineage("--json")
    assert sorted((path, path.stat().st_mtime_ns) for path in checkout.rglob("*")) == before


def test_a_moved_run_is_as_good(checkout, lineage, tmp_path):
    shutil.move(checkout / "runs" / "smoke", tmp_path / "else")
    assert lineage(f"--run={tmp_path / 'else'}")[0] == 0


def test_an_altered_byte_and_a_missing_file_are_named_with_their_command(checkout, lineage):
    flip(checkout / "runs/smoke/sft/weights", 3)
    (checkout / "runs/smoke/data/sources.json").unlink()
    code, text = lineage()
    assert code == 1
    assert told_of(text, "sft").endswith("altered: weights was altered")
    assert "sft altered causal-lm" in told_of(text, "sft")
    assert told_of(text, "data").endswith("altered: sources.json is missing")
    assert told_of(text, "ppo").startswith("ppo good")
    assert "MiB: 2 altered, 6 good" in text
    assert "To mend it:\n  make data sft RECIPE=smoke FORCE=1\n" in text


def test_many_altered_files_are_counted(checkout, lineage):
    folder = checkout / "runs/smoke/data"
    manifest = json.loads((folder / "manifest.json").read_text())
    one = manifest["content"]["files"]["weights"]
    manifest["content"]["files"] |= {f"part-{number}": one for number in range(9)}
    write_json(folder / "manifest.json", sealed(manifest))
    _, text = lineage()
    assert "altered: part-0 is missing; part-1 is missing; " in told_of(text, "data")
    assert "and 5 more" in told_of(text, "data")
    found = json.loads(lineage("--json")[1])["folders"][0]["findings"]
    assert [one["text"] for one in found if one["state"] == "altered"] == [
        f"part-{number} is missing" for number in range(9)
    ]


def test_a_rebuilt_parent_makes_its_descendants_stale(lineage):
    make("pretrain", "--force=true", text="other")
    code, text = lineage()
    assert code == 1
    assert told_of(text, "pretrain").startswith("pretrain good")
    assert "stale: it was made from another pretrain than the one" in told_of(text, "sft")
    assert told_of(text, "reward").endswith("stale: its parent sft is stale")
    assert "stale: its parent ppo is stale" in told_of(text, "evaluate")
    assert "  make sft reward ppo evaluate report RECIPE=smoke FORCE=1\n" in text


def test_a_changed_setting_is_named_with_both_values(checkout, lineage):
    yaml = checkout / "configs/smoke/sft.yaml"
    yaml.write_text(yaml.read_text().replace("steps: 20", "steps: 21"))
    os.utime(yaml, (1, 1))
    code, text = lineage()
    assert code == 1
    assert told_of(text, "sft").endswith(
        "stale: settings differ from configs/smoke/sft.yaml: training.steps: 20 when made, 21 now"
    )
    assert told_of(text, "pretrain").startswith("pretrain good")


def test_a_touched_yaml_is_stale_as_make_sees_it(checkout, lineage):
    (checkout / "configs/smoke/reward.yaml").touch()
    code, text = lineage()
    assert code == 1
    told = told_of(text, "reward")
    assert told.endswith("stale: configs/smoke/reward.yaml is newer than it, as make sees it")
    assert told_of(text, "ppo").endswith("stale: its parent reward is stale")


def test_a_parent_that_is_newer_by_time_alone_is_a_note(checkout, lineage):
    (checkout / "runs/smoke/reward/manifest.json").touch()
    code, text = lineage()
    assert code == 0
    assert "note: make would run it again, because reward is newer by" in told_of(text, "ppo")


def test_words_on_the_command_line_are_part_of_what_it_was_made_with(lineage):
    make("report", "--title=mine", "--force=true")
    code, text = lineage()
    assert code == 0
    assert told_of(text, "report").endswith("made with --title=mine")
    flip(Path("runs/smoke/report/weights"), 0)
    _, text = lineage()
    assert '  make report RECIPE=smoke FORCE=1 ARGS="--title=mine"\n' in text


def test_what_a_shell_would_obey_is_not_offered_for_pasting(checkout, lineage):
    path = checkout / "runs/smoke/report/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["circumstances"]["overrides"] = ["title=$(touch planted)", "run=/elsewhere"]
    write_json(path, sealed(manifest))
    code, text = lineage()
    assert code == 1
    assert "settings differ" in told_of(text, "report")
    assert text.rstrip().endswith("\n  make report RECIPE=smoke FORCE=1")


def test_unfinished_and_missing_folders_are_made_and_not_forced(checkout, lineage):
    (checkout / "runs/smoke/ppo/manifest.json").unlink()
    shutil.rmtree(checkout / "runs/smoke/report")
    code, text = lineage()
    assert code == 1
    assert told_of(text, "ppo").startswith("ppo unfinished - - - - -")
    assert "has no manifest.json, so the stage did not finish" in told_of(text, "ppo")
    assert told_of(text, "evaluate").endswith("stale: its parent ppo is unfinished")
    assert "missing: runs/smoke/report does not exist" in told_of(text, "report")
    assert "  make evaluate RECIPE=smoke FORCE=1\n  make ppo report RECIPE=smoke\n" in text


def test_a_manifest_that_cannot_be_read_is_altered(checkout, lineage):
    (checkout / "runs/smoke/sft/manifest.json").write_text("{")
    code, text = lineage()
    assert code == 1
    assert "altered: runs/smoke/sft/manifest.json is not valid JSON" in told_of(text, "sft")


def test_files_of_ones_own_are_a_note(checkout, lineage):
    (checkout / "runs/smoke/ppo/notes.txt").write_text("mine")
    code, text = lineage()
    assert code == 0
    assert told_of(text, "ppo").endswith("note: files that the stage did not make: notes.txt")


def test_a_guard_is_told_of_where_there_is_one(lineage):
    assert "reward_guard" not in lineage()[1]
    make("reward_guard")
    code, text = lineage()
    assert code == 0
    assert told_of(text, "reward_guard").startswith("reward_guard good reward ")


def test_a_model_outside_the_run_is_followed_there(checkout, lineage, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    make("tokenizer", f"--init_from={base}", "--force=true")
    told = told_of(lineage()[1], "tokenizer")
    digest = told.split("from tokenizer/init_from recorded ")[1][:12]
    assert f"recorded {digest} found {digest}" in told
    assert told.startswith("tokenizer good")
    flip(base / "config.json", 0)
    told = told_of(lineage()[1], "tokenizer")
    assert told.startswith("tokenizer stale")
    assert f"stale: {base}, which it was made from, has changed since" in told
    shutil.rmtree(base)
    told = told_of(lineage()[1], "tokenizer")
    assert "found outside the run, not known where" in told
    assert told.startswith("tokenizer good")


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_model_from_elsewhere_is_a_source(lineage, monkeypatch, is_pinned):
    package = Package(
        name="some-model", version="1.0", archive="x.whl", sha256="ab" * 32, licence="Apache-2.0"
    )
    monkeypatch.setattr(origin, "MODELS", (package,) if is_pinned else ())
    origin_name = "package:some-model==1.0/some_model/tiny.gguf"
    make("tokenizer", f"--init_from={origin_name}", "--force=true")
    text = lineage()[1]
    lines = text[text.index(f"  {origin_name}\n") :].splitlines()[1:3]
    expected = ["    version 1.0, licence Apache-2.0", f"    sha256 {'ab' * 32}"]
    unknown = ["    version not pinned, licence unknown", "    sha256 none"]
    assert lines == (expected if is_pinned else unknown)


def test_a_recipe_that_cannot_be_read_is_a_note(checkout, lineage):
    yaml = checkout / "configs/smoke/sft.yaml"
    yaml.write_text("stepz: 3\n")
    os.utime(yaml, (1, 1))
    told = told_of(lineage()[1], "sft")
    assert "note: not held against configs/smoke/sft.yaml:" in told
    assert "stepz" in told
    yaml.unlink()
    assert "note" not in told_of(lineage()[1], "sft")


def test_json_holds_the_same(checkout, lineage):
    flip(checkout / "runs/smoke/sft/weights", 3)
    code, text = lineage("--json")
    assert code == 1
    told = json.loads(text)
    assert [folder["stage"] for folder in told["folders"]] == list(CHAIN)
    assert (told["run"], told["recipe"]) == ("runs/smoke", "smoke")
    assert told["sources"] == [{key: SOURCE[key] for key in told["sources"][0]}]
    sft = told["folders"][3]
    assert sft["state"] == "altered"
    assert sft["findings"] == [{"state": "altered", "text": "weights was altered"}]
    assert {link["name"] for link in sft["manifest"]["links"]} == {"data", "pretrain"}
    assert told["mend"] == ["make sft RECIPE=smoke FORCE=1"]


def test_what_a_manifest_holds_does_not_steer_the_terminal(checkout, lineage):
    path = checkout / "runs/smoke/report/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["circumstances"]["git_commit"] = "\x1b[2Jgood\r"
    write_json(path, sealed(manifest))
    assert "?[2Jgood?" in lineage()[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--recipe=none"], "no recipe configs/none; recipes here: cpu, "),
        (["--run=nowhere"], "nowhere does not exist. Run: make RECIPE=smoke RUN=nowhere"),
        (["--runn=x"], "unrecognized arguments: --runn=x. Try: python -m stages.lineage --help"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(checkout, caplog, words, told):
    assert main(["--recipe=smoke", *words]) == 2
    assert f"lineage: {told}" in caplog.records[-1].getMessage()


def test_an_interrupted_look_has_its_own_code(checkout, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("stages.lineage.examine", interrupt)
    assert main(["--recipe=smoke"]) == 130


def test_help_loads_nothing_heavy():
    program = (
        "import sys\nfrom stages.lineage import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip().endswith("set()")
    assert "--json" in done.stdout
