"""Whatever a model, a row, a name or a manifest holds, a page shows it and never obeys it."""

import dataclasses
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.ppo.keep import keep_rollout
from pipeline.reporting.charts import Series, bin_chart, chart
from pipeline.reporting.content import page_content
from pipeline.reporting.microscope import microscope
from pipeline.reporting.page import render
from pipeline.storage import read_json, write_json
from tests.evaluation.fakes import judged, records
from tests.ppo.worlds import Speller, invented_outcome
from tests.reporting.fakes import fake_run
from tests.reporting.test_page import artifacts

OWNED = "document.title='OWNED'"
ATTACKS = [
    f"<script>{OWNED}</script>",
    f'"><img src=x onerror="{OWNED}">',
    f"'><svg onload={OWNED}>",
    f"</script></style></title><script>{OWNED}</script>",
    f"<a href=javascript:{OWNED} autofocus onfocus={OWNED}>",
    f"{{{{ 7 * 7 }}}}<iframe srcdoc='<script>parent.{OWNED}</script>'>",
    "\x1b[31m\0\u202e$\\frac{",
]
ATTACK = "".join(ATTACKS)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Tags(HTMLParser):
    """Collects a page's tags and attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The report and the rollouts of a run in which everything that has a text is hostile."""
    name = f"<img src=x onerror={OWNED}>"
    said = judged(random.Random(0), text=ATTACK)
    rows = [dataclasses.replace(row, prompt=ATTACK, sft=said, ppo=said) for row in records(12)]
    run = artifacts(fake_run(tmp_path_factory.mktemp("runs") / name, rows=rows))
    for artifact in run.values():
        about = artifact.manifest["circumstances"]
        about |= {
            "git_commit": ATTACK,
            "num_processes": ATTACK,
            "summary": {ATTACK: {ATTACK: ATTACK}},
        }
        artifact.content["kind"] = artifact.content["stage"] = ATTACK
        artifact.content["parents"] = {ATTACK: {"digest": ATTACK}}
    file = run["evaluate"].path / "results.json"
    results = read_json(file)
    sets = results["reward_model"]["sets"]
    results["reward_model"]["sets"] = {f"{ATTACK}{n}": one for n, one in enumerate(sets.values())}
    for policy in results["policies"].values():
        policy["commonest_reply"] = ATTACK
    write_json(file, results)
    metrics = run["ppo"].path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"policy/entropy"', f'"{ATTACKS[0]}/x"'))
    keep_rollout(run["ppo"].path, invented_outcome(3), update=1, tokenizer=Speller(ATTACK))
    title = f"{run['data'].path.parent.name}{ATTACK}"
    return {
        "report": render(page_content(run, title=title)),
        "rollouts": microscope(run["ppo"].path, title=title),
    }


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", ["report", "rollouts"])
def test_no_tag_and_no_attribute_is_anybody_elses(pages, name):
    page = Tags(pages[name])
    assert not {"script", "iframe", "svg", "object", "embed", "base", "form"} & page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "srcdoc"]
    for attribute, value in page.attributes:
        if attribute in ("src", "href"):
            assert re.match(
                r"(?:data:image/svg\+xml;base64,|#|index\.html$|rollouts\.html$)", value
            )
        if attribute == "style":
            assert not re.search(r"[<>\"'\\]|url|expression", value)
    assert ATTACKS[0] in page.text
    assert "49<iframe" not in page.text


@pytest.mark.parametrize("name", ["report", "rollouts"])
def test_a_policy_forbids_what_might_slip_through(pages, name):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', pages[name])
    assert policy is not None
    rules = policy[1].split("; ")
    assert rules[0] == "default-src 'none'"
    assert set(rules[1:]) <= {"img-src data:", "style-src 'unsafe-inline'"}


def test_a_name_in_a_chart_is_a_text(recwarn):
    hostile = "$x^{$ $\\frac{ \x1b\0 </text><script>"
    drawings = [
        chart("t", series=[Series(label=hostile, x=[1.0, 2.0], y=[1.0, 2.0])] * 2, x_label="step"),
        bin_chart("t", bins=["< 1"], rows={hostile: [0.5]}, x_label="gap"),
    ]
    from base64 import b64decode
    from xml.etree.ElementTree import fromstring

    for drawing in drawings:
        root = fromstring(b64decode(drawing.source.partition(",")[2]))
        assert not [tag for tag in root.iter() if "script" in str(tag.tag)]
        assert "<script>" in "".join(root.itertext())
    assert not recwarn.list


def title_in_the_browser(page: str, folder: Path) -> str:
    """The title of a page once a real browser has loaded it and run what it runs."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    words += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-500:]
    return found[1]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("attack", ATTACKS[:4])
def test_the_trap_is_real(tmp_path, attack):
    page = f"<!doctype html><title>still ours</title><body><p title=''>{attack}"
    assert title_in_the_browser(page, tmp_path) == "OWNED"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("name", ["report", "rollouts"])
@pytest.mark.parametrize("policy", ["with its policy", "without"])
def test_nothing_runs_in_a_browser(pages, tmp_path, name, policy):
    page = pages[name]
    if policy == "without":  # escaping alone must hold
        page = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page)
        assert "Content-Security" not in page
    title = title_in_the_browser(page, tmp_path)
    assert title != "OWNED"
    assert title.startswith("&lt;img src=x onerror=")
