"""Secrets of the environment never land in what is written, and settings may hold none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import load
from pipeline.errors import UserError
from pipeline.secrets import refuse_secrets
from stages import pretrain, report
from tests.security.secrets import PLANTED, found_in, home_with_netrc

SETTINGS = {
    "init_from=https://user:hunter2@example.invalid/model": "a name or password in front of",
    "init_from=https://ghp_0123456789@example.invalid/model": "a name or password in front of",
    "init_from=hf_abcdefghijklmnopqrstuvwxyz0123": "a token of the hub",
    "init_from=models/0123456789abcdef": "the value of the environment's OUR_API_KEY",
    'architecture.options={"a": {"b": ["x 0123456789abcdef"]}}': "the environment's OUR_API_KEY",
    'architecture.options={"0123456789abcdef": 1}': "the value of the environment's OUR_API_KEY",
    "run=runs/0123456789abcdef": "the value of the environment's OUR_API_KEY",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_holds_a_secret_is_refused_and_not_repeated(setting, monkeypatch):
    monkeypatch.setenv("OUR_API_KEY", "0123456789abcdef")
    with pytest.raises(UserError, match=SETTINGS[setting]) as caught:
        load(pretrain.Config, ["--recipe=smoke", f"--{setting}"], stage="pretrain")
    line = str(caught.value)
    assert setting.partition("=")[0] in line
    assert "set it in the environment" in line
    assert not [
        secret for secret in ("hunter2", "ghp_", "hf_a", "0123456789abcdef") if secret in line
    ]


def test_a_title_too(monkeypatch):
    monkeypatch.setenv("DATABASE_PASSWORD", "correct horse")
    with pytest.raises(
        UserError, match="title: holds the value of the environment's DATABASE_PASS"
    ):
        load(report.Config, ["--recipe=smoke", "--title=my correct horse"], stage="report")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SSH_KEY", "short"),  # by chance in a word
        ("GOOGLE_APPLICATION_CREDENTIALS", "configs"),  # a place
        ("EDITOR", "0123456789abcdef"),  # no secret by its name
    ],
)
def test_what_is_no_secret(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    refuse_secrets({"a": f"{value} configs/x short https://example.invalid/@x owner/name"})


TRACKING = """
from pipeline.config import load
from pipeline.distributed import setup
from pipeline.tracking import open_tracker
from stages import pretrain

words = ["--recipe=smoke", "--run=run", "--tracking=wandb,tensorboard"]
config = load(pretrain.Config, words, stage="pretrain")
setup(config)
tracker = open_tracker(config, stage="pretrain", key="0" * 64, parents={})
tracker.log(1, {"train/loss": 1.0})
tracker.table(1, [{"prompt": "a", "response": "b", "score": 1.0}])
config.run_dir.joinpath("manifest.json").write_text("{}")
tracker.attach(config.run_dir / "manifest.json", {"loss": 1.0})
tracker.finish()
"""


def test_what_trackers_write(tmp_path):
    """With every secret in the environment, in ~/.netrc, and one in the address of git's remote."""
    for name in ("pipeline", "stages", "configs"):
        (tmp_path / name).symlink_to(Path(name).absolute())
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    remote = f"https://{PLANTED['GIT_TOKEN']}:x-oauth-basic@example.invalid/x.git"
    for words in (["init", "-q"], ["commit", "-qm", "x", "--allow-empty"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    subprocess.run([*git, "remote", "add", "origin", remote], cwd=tmp_path, check=True)
    environment = {**os.environ, **PLANTED, "HOME": str(home_with_netrc(tmp_path / "home"))}
    done = subprocess.run(
        [sys.executable, "-c", TRACKING],
        cwd=tmp_path,
        env={**environment, "WANDB_MODE": "offline"},
        capture_output=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run").rglob("*.wandb"))
    assert list((tmp_path / "run").rglob("*.tfevents.*"))
    assert not found_in(tmp_path / "run")
    assert not [name for name, value in PLANTED.items() if value.encode() in done.stderr]
