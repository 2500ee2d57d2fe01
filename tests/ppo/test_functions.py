"""A reward function of the user's: what it is given, and every way in which it can fail."""

import gc
import os
import time

import pytest

from pipeline.errors import UserError
from pipeline.ppo.functions import FunctionScorer, Worker, function_file
from pipeline.reward.reading import Words
from pipeline.tokenizer import encode_prompt, encode_response, train_tokenizer

MODULE = """
import math, os, threading, time

def score(prompts, responses):
    return [len(p[-1]["content"]) + 0.5 * len(r) for p, r in zip(prompts, responses)]

def raises(prompts, responses):
    raise KeyError("no such word")

def short(prompts, responses):
    return [1.0]

def nothing(prompts, responses):
    return None

def nan(prompts, responses):
    return [1.0, math.nan]

def words(prompts, responses):
    return ["good", "bad"]

def leaves(prompts, responses):
    os._exit(7)

def hangs(prompts, responses):
    threading.Thread(target=time.sleep, args=(600,)).start()
    while True:
        pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's, found as the stage finds it."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_it_gets_messages_and_texts_and_its_scores_come_in_their_order(module):
    tokenizer = train_tokenizer(["hello there, friend"] * 5, vocabulary_size=300)
    said = [{"role": "user", "content": "four"}]
    prompts = [encode_prompt(tokenizer, "hi"), encode_prompt(tokenizer, said)]
    words = Words.behind(prompts, ["hi", said], tokenizer=tokenizer)
    scorer = FunctionScorer("my_rewards:score", words=words, timeout_seconds=30.0)
    responses = [encode_response(tokenizer, "yes"), encode_response(tokenizer, "no")[:-1]]
    assert scorer(prompts, responses).tolist() == [2 + 1.5, 4 + 1.0]
    process = scorer.workers[0].process
    del scorer
    gc.collect()
    assert process.returncode is not None  # it ends with its scorer


@pytest.mark.parametrize(
    ("name", "expected"),
    # Of the first response's words (a, nice, day!) one of three stands in the prompt.
    [("ends_as_a_sentence", [1.0, 0.0]), ("takes_up_the_prompt", [1 / 3, 0.0])],
)
def test_the_examples_in_configs_run(name, expected):
    worker = Worker(f"configs.rewards:{name}", timeout_seconds=30.0)
    prompts = [[{"role": "user", "content": "Nice day"}]] * 2
    assert worker.ask(prompts, ["a nice day!", ""]) == pytest.approx(expected)
    worker.end()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"raises raised KeyError: 'no such word' \(my_rewards.py, line 8\)"),
        ("short", "returned 1 scores for 2 responses"),
        ("nothing", "returned NoneType, not a list of numbers"),
        ("nan", "returned nan for response 1, not a finite number"),
        ("words", "returned 'good' for response 0, not a finite number"),
        ("leaves", "ended its process with exit code 7"),
    ],
)
def test_what_goes_wrong_is_one_line_that_names_the_function(module, name, message):
    worker = Worker(f"my_rewards:{name}", timeout_seconds=30.0)
    with pytest.raises(UserError, match=f"my_rewards:.*{message}"):
        worker.ask([[], []], ["a", "b"])
    worker.end()


def test_a_function_that_hangs_is_ended_with_all_its_threads(module):
    worker, start = Worker("my_rewards:hangs", timeout_seconds=1.0), time.monotonic()
    with pytest.raises(UserError, match="my_rewards:hangs gave no answer within 1 seconds"):
        worker.ask([[], []], ["a", "b"])
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(worker.process.pid, 0)


def test_a_module_that_cannot_be_used_is_told_before_training(module):
    assert function_file("my_rewards:score") == module / "my_rewards.py"
    with pytest.raises(UserError, match="there is no module nowhere.at_all; it is looked for"):
        function_file("nowhere.at_all:score")
    with pytest.raises(UserError, match="cannot be imported: ModuleNotFoundError: .*no_such_pack"):
        Worker("broken_rewards:score", timeout_seconds=30.0)
    with pytest.raises(UserError, match="cannot be imported: AttributeError: .*'missing'"):
        Worker("my_rewards:missing", timeout_seconds=30.0)
