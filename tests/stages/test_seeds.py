"""Seeds: the make commands, the table, refusals."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.checkpoint import open_artifact
from pipeline.command import TERMINATED
from pipeline.errors import UserError
from stages.seeds import Config, main, make_words, run_seed
from tests.evaluation.fakes import records
from tests.reporting.fakes import fake_run


class FakeMake:
    """Stands in for subprocess.run: writes an invented run where the chain would have."""

    def __init__(self, code=0):
        self.code, self.calls = code, []

    def __call__(self, words, **settings):
        self.calls.append(words)
        values = dict(word.split("=", 1) for word in words if "=" in word)
        folder = Path(values["RUN"])
        if not (folder / "report" / "manifest.json").exists() and not self.code:
            fake_run(folder, rows=records(30, seed=len(self.calls)), report=True)
        return subprocess.CompletedProcess(words, self.code)


@pytest.fixture
def make(monkeypatch):
    fake = FakeMake()
    monkeypatch.setattr("stages.seeds.subprocess", SimpleNamespace(run=fake))
    return fake


def seeds(folder, *words):
    return main(["--recipe=smoke", f"--run={folder / 'smoke'}", "--tracking=none", *words])


def test_each_seed_is_a_run_of_its_own():
    words = make_words(Config(recipe="cpu", tracking="none"), 2)
    assert words[:3] == ["make", "--no-print-directory", "all"]
    assert {"RECIPE=cpu", "RUN=runs/cpu-seed-2", "ARGS=--seed=2 --tracking=none"} <= set(words)
    assert "FORCE=1" not in words
    assert make_words(Config(force=True), 1)[-1] == "FORCE=1"


def test_one_process_is_left_to_make_which_may_have_accelerates_file():
    words = [make_words(Config(num_processes=number), 1) for number in (1, 2)]
    assert not any(word.startswith("NPROC") for word in words[0])
    assert "NPROC=2" in words[1]


def test_stages_keep_their_own_tracking_and_bits_unless_the_seeds_say_otherwise():
    assert "ARGS=--seed=1" in make_words(Config(), 1)
    told = make_words(Config(tracking="wandb", deterministic=True), 1)
    assert "ARGS=--seed=1 --tracking=wandb --deterministic=true" in told


def test_parallel_runs_share_the_cores(monkeypatch):
    monkeypatch.setattr("stages.seeds.num_cores", lambda: 8)
    assert "--threads=4" in " ".join(make_words(Config(parallel=2), 1))
    assert "--threads" not in " ".join(make_words(Config(), 1))
    assert "--threads=3" in " ".join(make_words(Config(parallel=2, threads=3), 1))


def test_the_table_holds_every_seed_and_the_mean(make, tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert seeds(tmp_path, "--seeds=[1,2,3]") == 0
    assert [folder.name for folder in sorted(tmp_path.iterdir())] == [
        "smoke-seed-1",
        "smoke-seed-2",
        "smoke-seed-3",
        "smoke-seeds",
    ]
    artifact = open_artifact(tmp_path / "smoke-seeds" / "seeds", kind="report")
    assert set(artifact.content["parents"]) == {"seed-1", "seed-2", "seed-3"}
    table = json.loads((artifact.path / "seeds.json").read_text())
    wins = next(row for row in table["figures"] if row["name"] == "gold_win_rate")
    assert wins["mean"] == pytest.approx(sum(wins["values"].values()) / 3)
    assert {"minutes", "peak_memory_gib"} <= {row["name"] for row in table["figures"]}
    assert "| Gold win rate over SFT |" in (artifact.path / "README.md").read_text()
    assert "over 3 seeds" in caplog.text


def test_the_same_seeds_again_are_up_to_date(make, tmp_path, caplog):
    assert seeds(tmp_path, "--seeds=[1,2]") == 0
    with caplog.at_level("INFO"):
        assert seeds(tmp_path, "--seeds=[1,2]") == 0
    assert "up to date" in caplog.text


def test_a_failed_run_names_its_seed_and_leaves_no_table(make, tmp_path, caplog):
    make.code = 2
    assert seeds(tmp_path, "--seeds=[4]") == 2
    assert "seed 4 ended with exit code 2" in caplog.records[-1].getMessage()
    assert not (tmp_path / "smoke-seeds").exists()


def test_parallel_runs_speak_into_their_own_files(make, tmp_path):
    make.code = 2
    config = Config(run=str(tmp_path / "smoke"), parallel=2)
    with pytest.raises(UserError, match=r"smoke-seed-1/make\.log"):
        run_seed(config, 1)
    assert (tmp_path / "smoke-seed-1" / "make.log").exists()


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--seeds=[]", "seeds: must be different numbers"),
        ("--seeds=[1,1]", "seeds: must be different numbers"),
        ("--seeds=[-1]", "seeds: must be different numbers"),
        ("--seeds=[one]", "seeds"),
        ("--parallel=0", "parallel: must be at least 1, got 0"),
    ],
)
def test_a_wrong_setting_is_one_line(make, tmp_path, caplog, word, told):
    assert seeds(tmp_path, word) == 2
    assert told in caplog.records[-1].getMessage()
    assert make.calls == []


def test_sigterm_reaches_the_run_at_work_and_no_other_is_started(tmp_path):
    fake = tmp_path / "bin" / "make"
    fake.parent.mkdir()
    fake.write_text(
        f"#!/bin/sh\ntrap 'echo stopped >> {tmp_path}/told; exit 2' TERM\n"
        f"echo started >> {tmp_path}/told\nwhile :; do sleep 0.05; done\n"
    )
    fake.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.seeds", "--recipe=smoke", f"--run={tmp_path}/smoke"],
        env={**os.environ, "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    told, deadline = tmp_path / "told", time.monotonic() + 60
    while not told.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == TERMINATED
    assert "Traceback" not in said
    assert told.read_text() == "started\nstopped\n"
