"""The real chain on the smoke recipe: make, make again, touch, kill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chain import (
    STAGES,
    TIMEOUT_SECONDS,
    closing_lines,
    command,
    copy_sources,
    environment,
    make,
    planned,
)
from tests.security.secrets import found_in


def content(folder: Path, stage: str) -> dict[str, object]:
    """The content part of a finished stage's manifest."""
    manifest = json.loads((folder / "runs" / "smoke" / stage / "manifest.json").read_text())
    part: dict[str, object] = manifest["content"]
    return part


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in which the chain has run once."""
    folder = copy_sources(tmp_path_factory.mktemp("chain"))
    result = make(folder)
    assert result.returncode == 0, result.stderr[-3000:]
    assert closing_lines(result) == STAGES
    (folder / "runs" / "make.log").write_text(result.stdout + result.stderr)
    return folder


def test_every_stage_leaves_a_complete_folder(checkout):
    for stage in STAGES:
        folder = checkout / "runs" / "smoke" / stage
        assert content(checkout, stage)["stage"] == stage
        assert (folder / "README.md").read_text().startswith("# ")
        assert not list(folder.rglob("*.tmp"))


def test_no_secret_of_the_environment_is_written(checkout):
    assert (checkout / "runs" / "make.log").stat().st_size > 0
    assert not found_in(checkout / "runs")


def test_the_page_needs_no_network(checkout):
    page = (checkout / "runs" / "smoke" / "report" / "index.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo"])
def test_plain_from_pretrained_loads_every_language_model(checkout, stage):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkout / "runs" / "smoke" / stage
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "hello"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    replies = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert replies.shape[1] > prompt["input_ids"].shape[1]


def test_plain_from_pretrained_loads_the_reward_model(checkout):
    from transformers import AutoModelForSequenceClassification

    folder = checkout / "runs" / "smoke" / "reward"
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 1


def test_a_second_make_runs_nothing_and_says_so_in_one_line(checkout):
    result = make(checkout)
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout == "make: Nothing to be done for 'all'.\n"


def test_the_lineage_of_a_finished_run_is_good_wherever_it_lies(checkout, tmp_path):
    copy = shutil.copytree(checkout / "runs" / "smoke", tmp_path / "copy")
    for words in ([], [f"RUN={copy}"]):
        result = make(checkout, "lineage", *words)
        assert result.returncode == 0, result.stdout
        assert result.stdout.endswith("MiB: all good\n")
    (copy / "sft" / "config.json").write_text("{}")
    result = make(checkout, "lineage", f"RUN={copy}")
    assert result.returncode == 2  # make's own; the command's was 1
    assert "altered: config.json was altered" in result.stdout
    assert planned(checkout) == []


def test_a_touched_yaml_reruns_exactly_what_depends_on_it(checkout):
    recipe = checkout / "configs" / "smoke"
    for name, rerun in (
        ("reward", ["reward", "ppo", "evaluate", "report"]),
        ("evaluate", ["evaluate", "report"]),
    ):
        before = (recipe / f"{name}.yaml").stat()
        (recipe / f"{name}.yaml").touch()
        assert planned(checkout) == rerun
        os.utime(recipe / f"{name}.yaml", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert planned(checkout) == []
    (recipe / "report.yaml").touch()
    assert closing_lines(make(checkout)) == ["report"]
    assert planned(checkout) == []


def test_a_finished_stage_refuses_other_settings_in_one_line(checkout):
    result = make(checkout, "ppo", "ARGS=--kl.coef=0.123")
    assert result.returncode == 2
    ours, of_make = result.stderr.splitlines()
    assert "kl.coef" in ours
    assert "FORCE=1" in ours
    assert of_make.startswith("make: *** [")
    assert planned(checkout) == []


def test_the_same_settings_again_are_no_work(checkout):
    result = make(checkout, "sft", "ARGS=--seed=1")
    assert result.returncode == 0
    assert result.stderr.count("\n") == 1
    assert planned(checkout) == []


def test_a_mistyped_setting_is_one_line_and_exit_code_two(checkout):
    result = make(checkout, "ppo", "ARGS=--kl.coeff=1")
    assert result.returncode == 2
    ours, of_make = result.stderr.splitlines()
    assert "kl.coeff" in ours
    assert of_make.endswith("Error 2")


def kill_when(process: "subprocess.Popen[bytes]", pattern: str, folder: Path) -> None:
    """Kills a process and its children as soon as a file of that pattern exists."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_an_interrupted_stage_is_resumed_alone_and_ends_in_the_same_bytes(checkout):
    folder = checkout / "runs" / "smoke" / "ppo"
    straight = content(checkout, "ppo")
    shutil.move(folder, folder.with_name("ppo-straight"))
    process = subprocess.Popen(
        command("ppo"),
        cwd=checkout,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    kill_when(process, "checkpoints/step-*", folder)
    assert not (folder / "manifest.json").exists()
    assert planned(checkout, "ppo") == ["ppo"]
    result = make(checkout, "ppo")
    assert closing_lines(result) == ["ppo"], result.stderr[-3000:]
    assert "goes on from step" in result.stderr
    assert content(checkout, "ppo") == straight


def test_chat_answers_with_two_models_side_by_side(checkout):
    result = subprocess.run(
        command("chat", "MODELS=runs/smoke/sft runs/smoke/ppo"),
        cwd=checkout,
        env=environment(),
        input="hello\n/quit\n",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "runs/smoke/sft" in result.stdout
    assert "runs/smoke/ppo" in result.stdout


def test_replies_in_bulk_come_from_any_model_folder(checkout):
    (checkout / "prompts.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "how are you?"}\n')
    result = subprocess.run(
        [
            *(sys.executable, "-m", "stages.evaluate", "--generate.model=runs/smoke/ppo"),
            *("--generate.prompts=prompts.jsonl", "--generate.output=replies.jsonl"),
        ],
        cwd=checkout,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (checkout / "replies.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["hello", "how are you?"]


def test_seeds_are_whole_runs_and_one_table(checkout):
    shutil.copytree(checkout / "runs" / "smoke", checkout / "runs" / "smoke-seed-1")
    result = make(checkout, "seeds", "SEEDS=1")
    assert result.returncode == 0, result.stderr[-3000:]
    table = (checkout / "runs" / "smoke-seeds" / "seeds" / "README.md").read_text()
    assert "| Gold win rate over SFT |" in table
