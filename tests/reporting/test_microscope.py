"""The microscope: numbers of every token, colours, and nothing a model wrote is obeyed."""

import re

import pytest

from pipeline.ppo.keep import keep_rollout, kept_rollouts
from pipeline.reporting.microscope import ROWS, colour, microscope, read_rollout, scale, spread
from tests.ppo.worlds import Speller, invented_outcome
from tests.reporting.test_page import ATTACK, read


@pytest.fixture
def folder(tmp_path):
    keep_rollout(tmp_path, invented_outcome(40), update=30, tokenizer=Speller())
    return tmp_path


def test_responses_go_from_the_lowest_score_to_the_highest(folder):
    rollout = read_rollout(kept_rollouts(folder)[30], update=30)
    scores = [response.score for response in rollout.responses]
    assert rollout.num_responses == 40
    assert len(scores) == ROWS
    assert scores == sorted(scores)
    assert (scores[0], scores[-1]) == (0.0, 39.0)


def test_a_response_counts_its_own_tokens_alone(folder):
    outcome = invented_outcome(40)
    last = read_rollout(kept_rollouts(folder)[30], update=30).responses[-1]
    assert (last.row, last.ended, len(last.tokens), len(last.written)) == (39, False, 4, 1)
    assert last.total("kl") == pytest.approx(float(outcome.experience.kl[39].sum()))
    assert last.total("rewards") == pytest.approx(float(outcome.rewards[39].sum()))


def test_the_page_shows_every_number_and_needs_nothing_else(folder):
    html = microscope(folder, title="run")
    page = read(html)
    assert not page.open
    assert page.addresses == ["index.html"]
    assert "script" not in page.tags
    for words in ("log π", "KL", "value", "adv.", "reward", "mask", "cut before EOS", "ended"):
        assert words in page.text
    advantage = invented_outcome(40).advantages[39, 0]
    assert f'<td class="advantages">{advantage:.2f}</td>' in html
    assert html == microscope(folder, title="run")


def test_what_a_model_wrote_is_shown_and_never_obeyed(tmp_path):
    keep_rollout(tmp_path, invented_outcome(3), update=1, tokenizer=Speller(ATTACK))
    html = microscope(tmp_path, title="<b>run</b>")
    page = read(html)
    assert not {"script", "img"} & page.tags
    assert "<b>run" not in html
    assert not re.search(r"<[^>]*onerror", html)
    assert ATTACK in page.text
    assert "default-src 'none'" in html


def test_a_quotation_mark_cannot_leave_an_attribute(tmp_path):
    keep_rollout(tmp_path, invented_outcome(2), update=1, tokenizer=Speller('" onclick="x'))
    assert '" onclick' not in microscope(tmp_path, title="run")


@pytest.mark.parametrize(
    ("count", "found"), [(1, [0]), (16, [*range(16)]), (31, [*range(0, 31, 2)])]
)
def test_rows_are_spread_over_the_whole_rollout(count, found):
    assert spread(range(count)) == found


def test_the_scale_leaves_outliers_and_what_does_not_count_aside():
    rows = [{"kl": [99.0, *map(float, range(-9, 10)), 50.0], "mask": [False] + [True] * 20}]
    assert scale(rows, "kl") == 9.0
    assert scale([{"kl": [0.0], "mask": [True]}], "kl") == 1.0


def test_colours_have_a_sign_and_a_depth():
    assert colour(0.5, scale=1.0) == "rgba(37,99,168,0.28)"
    assert colour(-7.0, scale=1.0) == "rgba(209,73,91,0.55)"
