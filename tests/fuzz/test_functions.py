"""Reward functions that return anything, and that do what no function should."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.ppo.function_worker import answer
from pipeline.ppo.functions import Worker
from tests.fuzz.support import assert_clear, fuzz, values

MODULE = """
import os, sys, threading, time

def leaves_softly(prompts, responses):
    sys.exit("no more")

def is_interrupted(prompts, responses):
    raise KeyboardInterrupt

def has_no_words(prompts, responses):
    class Silent(Exception):
        def __str__(self):
            raise RuntimeError
    raise Silent

def shouts(prompts, responses):
    raise ValueError("x" * 10**6 + "\\n\\x1b[31m\\ud800")

def prints(prompts, responses):
    print("scores", *range(20000))
    sys.stderr.write("and more\\n")
    return [1.0] * len(responses)

def closes(prompts, responses):
    os.closerange(3, 200)
    return [1.0] * len(responses)

def scribbles(prompts, responses):
    for number in range(3, 200):
        try:
            os.write(number, b"\\0\\0\\0\\x03abc")
        except OSError:
            pass
    return [1.0] * len(responses)

def forks(prompts, responses):
    if os.fork() == 0:
        time.sleep(600)
    os._exit(3)

def changes(prompts, responses):
    prompts.clear(), responses.clear()
    return [1.0, 2.0]

class Hidden(float):
    def __repr__(self):
        raise RuntimeError("no sign of me")

def hides(prompts, responses):
    return [Hidden("nan"), 1.0]

def recurses(prompts, responses):
    return recurses(prompts, responses)

def fills(prompts, responses):
    return [b" " * 2**62, 1.0]

not_callable = 3
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "odd_rewards.py").write_text(MODULE)
    (folder / "leaving_rewards.py").write_text("import sys\nsys.exit(4)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


odd_scores = values | st.sampled_from(
    (10**400, Fraction(1, 3), complex(1, 2), True, b"1", {1.0, 2.0}, range(2), iter([1.0, 2.0]))
)


@fuzz(100)
@given(scores=odd_scores | st.lists(odd_scores, min_size=2, max_size=2))
def test_whatever_is_returned_is_two_finite_numbers_or_told(scores):
    kind, value = answer(lambda _prompts, _responses: scores, [[], []], ["a", "b"])
    assert kind in ("scores", "fault")
    if kind == "scores":
        assert len(value) == 2
        assert all(isinstance(one, float) and math.isfinite(one) for one in value)
    else:
        assert_clear(str(UserError(f"module:function {value}")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leaves_softly", "raised SystemExit: no more"),
        ("is_interrupted", "raised KeyboardInterrupt"),
        ("has_no_words", "raised Silent: without a message"),
        ("shouts", "raised ValueError: xxx"),
        ("closes", "ended its process with exit code 0"),
        ("scribbles", "wrote into files that are not its own"),
        ("forks", "gave no answer within 1 seconds"),
        ("hides", "raised RuntimeError: no sign of me"),
        ("recurses", "raised RecursionError"),
        ("fills", "raised MemoryError"),
        ("not_callable", "raised TypeError: 'int' object is not callable"),
    ],
)
def test_what_no_function_should_do_is_one_line(module, name, message):
    worker = Worker(f"odd_rewards:{name}", timeout_seconds=1.0 if name == "forks" else 60.0)
    with pytest.raises(UserError, match=message) as caught:
        worker.ask([[], []], ["a", "b"])
    assert_clear(str(caught.value))
    worker.end()


@pytest.mark.parametrize(("name", "scores"), [("prints", [1.0, 1.0]), ("changes", [1.0, 2.0])])
def test_what_prints_or_changes_what_it_was_given_still_scores(module, name, scores):
    worker = Worker(f"odd_rewards:{name}", timeout_seconds=60.0)
    assert worker.ask([[], []], ["a", "\ud800"]) == scores
    assert worker.ask([[], []], ["a", "b"]) == scores
    worker.end()


def test_a_module_that_leaves_while_it_is_imported_is_told(module):
    with pytest.raises(UserError, match="cannot be imported: SystemExit: 4"):
        Worker("leaving_rewards:score", timeout_seconds=30.0)
