"""The evaluate stage on tiny models: figures, invariance, bulk generation, refusals."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from pipeline.checkpoint import open_artifact
from stages.evaluate import main
from tests.evaluation.fake_chain import make_chain
from tests.evaluation.fakes import save_language_model

SMALL = [
    "--recipe=smoke",
    "--tracking=none",
    "--threads=1",
    "--num_prompts=12",
    "--bootstrap_samples=100",
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return make_chain(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def evaluated(chain):
    assert main([f"--run={chain}", *SMALL]) == 0
    return open_artifact(chain / "evaluate", kind="report")


def copy(chain, tmp_path):
    return shutil.copytree(
        chain, tmp_path / "run", ignore=shutil.ignore_patterns("evaluate", "report")
    )


def results_of(run):
    return json.loads((run / "evaluate" / "results.json").read_text())


def records_of(run):
    return list(map(json.loads, (run / "evaluate" / "samples.jsonl").read_text().splitlines()))


def complaint(capsys, caplog, *words):
    """The one line a mistake is told in."""
    caplog.clear()
    assert main(list(words)) == 2
    return caplog.records[-1].getMessage()


def test_every_figure_is_there(evaluated):
    results = results_of(evaluated.path.parent)
    assert set(results["policies"]) == {"sft", "ppo"}
    assert [row["n"] for row in results["best_of_n"]] == [2, 4]
    assert results["comparison"]["kl"]["value"] > 0
    assert results["max_response_tokens"] == 6
    assert results["prompts_left_out"] == 1
    tax = results["alignment_tax"]
    assert evaluated.summary["text_perplexity_ratio"] == tax["ratio"] == tax["ppo"] / tax["sft"]
    assert results["reward_model"]["split"] == "test"
    tweets = results["reward_model"]["sets"]["tweets"]
    assert tweets["num_pairs"] > 0
    assert tweets["calibration"]["observed_by"] == "order"  # the recipe's labels are hard
    assert evaluated.summary["gold_win_rate"] == results["comparison"]["gold_win_rate"]["value"]
    assert "| Gold win rate over SFT |" in (evaluated.path / "README.md").read_text()


def test_there_is_one_sample_per_prompt_evenly_spaced(evaluated, chain):
    rows = records_of(chain)
    assert [row["row"] for row in rows] == list(range(12))
    assert [row["group"] for row in rows] == [f"chat-{i * 20 // 12 // 3}" for i in range(12)]
    assert all(len(row["draws"]) == 4 for row in rows)
    assert all(row["ppo"]["num_tokens"] <= 6 for row in rows)


def test_the_same_evaluation_again_is_up_to_date(evaluated, chain, caplog):
    before = (chain / "evaluate" / "manifest.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        assert main([f"--run={chain}", *SMALL]) == 0
    assert "up to date" in caplog.text
    assert (chain / "evaluate" / "manifest.json").stat().st_mtime_ns == before


def test_batches_do_not_change_what_is_said(evaluated, chain, tmp_path):
    other = copy(chain, tmp_path)
    assert main([f"--run={other}", *SMALL, "--batch_size=5"]) == 0
    for ours, theirs in zip(records_of(chain), records_of(other), strict=True):
        assert ours["ppo"]["text"] == theirs["ppo"]["text"]
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-4)
        assert [d["text"] for d in ours["draws"]] == [d["text"] for d in theirs["draws"]]


def together(folder, *words, environment):
    """Evaluates in two processes, as `make NPROC=2` does."""
    launch = [sys.executable, "-m", "pipeline.launch", "2", "stages.evaluate"]
    result = subprocess.run(
        [*launch, f"--run={folder}", *SMALL, *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("models are whole on every process") == bool(environment)


def leaves(value):
    """What rows and objects hold, in their order."""
    if not isinstance(value, dict | list):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return [leaf for one in inner for leaf in leaves(one)]


@pytest.mark.parametrize(
    ("num_prompts", "environment"), [(12, {}), (1, {"ACCELERATE_USE_FSDP": "true"})]
)
def test_two_processes_find_what_one_does(chain, tmp_path, num_prompts, environment):
    # Of one prompt, the second process gets none. What divides models in training does not here.
    alone, two = copy(chain, tmp_path / "alone"), copy(chain, tmp_path / "together")
    words = [f"--num_prompts={num_prompts}"]
    assert main([f"--run={alone}", *SMALL, *words]) == 0
    together(two, *words, environment=environment)
    assert len(records_of(two)) == num_prompts
    for found in (records_of, results_of):
        for ours, theirs in zip(leaves(found(two)), leaves(found(alone)), strict=True):
            is_figure = isinstance(theirs, float)
            assert ours == (pytest.approx(theirs, abs=1e-4) if is_figure else theirs)


def test_a_policy_against_itself_is_even_because_both_draw_the_same_numbers(tmp_path):
    run = make_chain(tmp_path / "run", same_policy=True)
    assert main([f"--run={run}", *SMALL, "--best_of.sizes=[2]", "--best_of.num_prompts=5"]) == 0
    results = results_of(run)
    assert results["comparison"]["tie_frac"] == 1.0
    assert results["comparison"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert results["best_of_n_prompts"] == 5
    drawn = [row["row"] for row in records_of(run) if row["draws"]]
    assert drawn == [i * 12 // 5 for i in range(5)]


@pytest.mark.parametrize(("words", "chosen"), [([], "best"), (["--policy=last"], "last")])
def test_the_policy_that_a_guard_chose_is_the_one(tmp_path, words, chosen):
    run = make_chain(tmp_path / "run", best_policy=True)
    assert main([f"--run={run}", *SMALL, *words]) == 0
    results = results_of(run)
    assert results["policy"] == chosen
    assert (results["comparison"]["kl"]["value"] > 1e-3) == (chosen == "last")
    assert ("PPO is `ppo/best`" in (run / "evaluate/README.md").read_text()) == (chosen == "best")


def test_a_best_policy_that_nobody_chose_is_refused(chain, tmp_path, capsys, caplog):
    run = copy(chain, tmp_path)
    line = complaint(capsys, caplog, f"--run={run}", *SMALL, "--policy=best")
    assert (
        "ppo/best, which a guard chooses. Run ppo with --guard.every=1, or set it to last" in line
    )
    line = complaint(capsys, caplog, f"--run={run}", *SMALL, "--policy=first")
    assert line.endswith("policy: must be one of auto, last, best, got 'first'")


def test_a_missing_parent_is_refused(chain, tmp_path, capsys, caplog):
    run = copy(chain, tmp_path)
    shutil.rmtree(run / "ppo")
    assert "ppo does not exist. Run: make ppo" in complaint(capsys, caplog, f"--run={run}", *SMALL)
    assert not (run / "evaluate").exists()


def test_an_altered_parent_is_refused(chain, tmp_path, capsys, caplog):
    run = copy(chain, tmp_path)
    (run / "sft" / "config.json").write_text("{}")
    words = complaint(capsys, caplog, f"--run={run}", *SMALL)
    assert "config.json was altered after the stage finished" in words


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "--num_prompts=999",
            "num_prompts: .* only 20 prompts of at most 30 tokens, 999 asked",
        ),
        ("--num_prompts=0", "num_prompts: must be at least 1, got 0"),
        ("--batch_size=0", "batch_size: must be at least 1, got 0"),
        ("--bootstrap_samples=99", "bootstrap_samples: must be at least 100, got 99"),
        ("--best_of.sizes=[4,2]", r"best_of.sizes: must be ascending numbers from 2 on"),
        ("--best_of.sizes=[1]", r"best_of.sizes: must be ascending numbers from 2 on"),
        ("--best_of.num_prompts=-1", "best_of.num_prompts: must be at least 0, got -1"),
        ("--best_of.num_prompts=13", "best_of.num_prompts: must be at most num_prompts 12"),
        ("--targets={kll: [null, 9]}", r"targets: must be among gold_win_rate, .*; got 'kll'"),
        (
            "--targets={kl: [null, null]}",
            r"targets.kl: must be \[low, high\] with one of them null",
        ),
        ("--targets={kl: [9, 8]}", r"targets.kl: must be \[low, high\]"),
        ("--generate.model=x", "generate.prompts: needed beside the other two"),
        ("--generate.temperature=0", "generate.temperature: must be above 0, got 0"),
        ("--generate.max_response_tokens=0", "generate.max_response_tokens: must be at least 1"),
        ("--best_off.sizes=[2]", "best_off"),
    ],
)
def test_a_wrong_setting_is_one_line(chain, capsys, caplog, word, told):
    import re

    words = complaint(capsys, caplog, f"--run={chain}", *SMALL, word)
    assert re.search(told, words)
    assert "\n" not in words


def test_a_data_folder_without_test_prompts_is_refused(chain, tmp_path):
    from pipeline.errors import UserError
    from stages.evaluate import PARENTS, held_out_prompts

    run = copy(chain, tmp_path)
    parents = {name: open_artifact(run / name, kind=kind) for name, kind in PARENTS.items()}
    (run / "data" / "prompts-test.parquet").unlink()
    with pytest.raises(
        UserError, match=r"prompts-test\.parquet does not exist: .* then run: make data"
    ):
        held_out_prompts(parents, num_prompts=1)


def test_another_tokenizer_is_refused(chain, tmp_path, caplog):
    from pipeline.errors import UserError
    from pipeline.evaluation.loading import read_tokenizers
    from pipeline.tokenizer import train_tokenizer
    from stages.evaluate import PARENTS

    run = copy(chain, tmp_path)
    parents = {name: open_artifact(run / name, kind=kind) for name, kind in PARENTS.items()}
    train_tokenizer(["quite other words"] * 3, vocabulary_size=290).save_pretrained(run / "reward")
    with pytest.raises(UserError, match=r"reward has another tokenizer than .*sft"):
        read_tokenizers(parents)


def test_generation_in_bulk_needs_no_run(tmp_path, caplog):
    model = save_language_model(tmp_path / "model")
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out" / "replies.jsonl"
    prompts.write_text("love you\nplay music\nwhat a great day\n")
    words = [
        "--recipe=smoke",
        "--tracking=none",
        "--threads=1",
        f"--run={tmp_path / 'none'}",
        f"--generate.model={model}",
        f"--generate.prompts={prompts}",
        f"--generate.output={output}",
        "--generate.max_response_tokens=5",
    ]
    assert main(words) == 0
    rows = list(map(json.loads, output.read_text().splitlines()))
    assert [row["prompt"] for row in rows] == ["love you", "play music", "what a great day"]
    assert set(rows[0]) == {"prompt", "response", "ended"}
    assert not (tmp_path / "none").exists()
    first = output.read_bytes()
    assert main([*words, "--batch_size=1"]) == 0
    assert output.read_bytes() == first


def test_generation_from_a_reward_model_is_refused(chain, tmp_path, capsys, caplog):
    (tmp_path / "p.txt").write_text("hello\n")
    words = complaint(
        capsys,
        caplog,
        "--recipe=smoke",
        "--threads=1",
        f"--generate.model={chain / 'reward'}",
        f"--generate.prompts={tmp_path / 'p.txt'}",
        f"--generate.output={tmp_path / 'o.jsonl'}",
    )
    assert "is a reward folder, but a causal-lm folder is needed" in words
    assert not (tmp_path / "o.jsonl").exists()
