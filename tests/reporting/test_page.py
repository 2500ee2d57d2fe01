"""The page: self-contained, escaped, complete."""

import base64
import dataclasses
import re
from html.parser import HTMLParser

import pytest

from pipeline.checkpoint import open_artifact
from pipeline.errors import UserError
from pipeline.reporting.content import choose_samples, page_content
from pipeline.reporting.page import figure, interval, render, words
from tests.evaluation.fakes import judged, records
from tests.reporting.fakes import CHAIN, fake_run

ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}'


class Reader(HTMLParser):
    """Collects tags, addresses and text as a browser would see them."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text, self.open = set(), [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags do not nest"

    def handle_data(self, data):
        self.text += data


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


def artifacts(folder):
    return {
        stage: open_artifact(folder / stage, kind=kind)
        for stage, (kind, _) in CHAIN.items()
        if stage != "report"
    }


def hostile_records():
    import random

    generator = random.Random(0)
    return [
        dataclasses.replace(
            row,
            prompt=ATTACK,
            sft=judged(generator, text=ATTACK),
            ppo=judged(generator, text=ATTACK),
        )
        for row in records(12)
    ]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    run = fake_run(tmp_path_factory.mktemp("runs") / "invented")
    return page_content(artifacts(run), title="invented")


@pytest.fixture(scope="module")
def page(content):
    return read(render(content))


def test_the_page_needs_nothing_else(page):
    assert {"script", "link", "iframe", "object"} & page.tags == set()
    assert all(
        address.startswith(("#", "data:image/svg+xml;base64,")) or address == "rollouts.html"
        for address in page.addresses
    )
    assert not page.open


def test_every_image_is_a_drawing_without_foreign_addresses(page):
    images = [address for address in page.addresses if address.startswith("data:")]
    assert len(images) > 10
    for address in images:
        drawing = base64.b64decode(address.partition(",")[2]).decode()
        assert drawing.rstrip().endswith("</svg>")
        assert not re.search(r"(?:href|src)=\"(?!#)", drawing)


def test_every_section_is_there_and_reachable(page, content):
    html = render(content)
    sections = re.findall(r'<section id="(\w+)"', html)
    assert sections == re.findall(r'<a href="#(\w+)"', html)
    for words_ in ("Targets", "against KL", "Best-of-n", "held-out ratings", "Lineage"):
        assert words_ in page.text


def test_lineage_time_and_memory_of_every_stage(content):
    assert [stage.name for stage in content["stages"]] == [s for s in CHAIN if s != "report"]
    reward = content["stages"][4]
    by_name = {stage.name: stage for stage in content["stages"]}
    assert reward.parents == [f"{name} {by_name[name].digest[:8]}" for name in ("data", "sft")]
    assert content["minutes"] == sum(stage.minutes for stage in content["stages"])


def test_a_kl_to_a_moved_reference_is_not_drawn_as_one_to_sft(tmp_path):
    run = artifacts(fake_run(tmp_path / "run"))

    def told(rate: float) -> list[str]:
        run["ppo"].config["kl"] = {"reference_rate": rate}
        charts = page_content(run, title="run")["frontier"]
        return [chart.description for chart in charts]

    assert "PPO while training" in told(0.0)[-1]
    assert told(0.5)[-1].endswith(
        ": SFT, best of n, at its KL bound, PPO by KL to SFT, nats per response"
    )


def test_what_a_model_wrote_is_shown_and_never_obeyed(tmp_path):
    run = fake_run(tmp_path / "run", rows=hostile_records())
    html = render(page_content(artifacts(run), title="<b>run</b>"))
    reader = read(html)
    assert reader.tags & {"script", "b"} == {"b"}
    assert "<b>run" not in html
    assert "<script" not in html
    assert "onerror=alert" not in re.sub(r"&lt;img src=x onerror=alert\(1\)&gt;", "", html)
    assert ATTACK in reader.text
    assert all(
        address.startswith(("#", "data:")) or address == "rollouts.html"
        for address in reader.addresses
    )


def test_the_same_run_gives_the_same_page(content, tmp_path):
    assert render(content) == render(content)


def test_what_the_diagnoser_said_has_its_update_cause_and_section(content, page):
    assert [(one.update, one.rule.name) for one in content["diagnoses"]] == [(20, "clip_frac_high")]
    assert content["diagnoses"][0].rule.cause in page.text
    assert "docs/diagnosis.md#clip_frac_high" in page.text
    silent = read(render(content | {"diagnoses": []}))
    assert f"none of its {content['num_rules']} rules held" in silent.text


def test_samples_are_even_and_also_the_worst(content):
    rows = [dataclasses.asdict(row) for row in records(40)]
    even, losses, far = choose_samples(rows)
    assert [row["row"] for row in even.rows] == [i * 40 // 12 for i in range(12)]
    gains = sorted(row["ppo"]["gold"] - row["sft"]["gold"] for row in rows)
    assert [row["ppo"]["gold"] - row["sft"]["gold"] for row in losses.rows] == gains[:4]
    assert far.rows[0]["kl"] == max(row["kl"] for row in rows)


def test_an_evaluation_without_samples_is_refused(tmp_path):
    run = artifacts(fake_run(tmp_path / "run"))
    (run["evaluate"].path / "samples.jsonl").write_text("")
    with pytest.raises(UserError, match=r"holds no samples\. Run: make evaluate RUN="):
        page_content(run, title="run")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (0.0, "0.000"),
        (12345, "12,345"),
        (0.12345, "0.123"),
        (-3.14159, "-3.142"),
        (31.4159, "31.42"),
        (314.159, "314.2"),
        (31415.9, "31,416"),
        (0.00012, "1.2e-04"),
        (float("inf"), "inf"),
        (True, "True"),
        ("bf16", "bf16"),
    ],
)
def test_figures_are_about_four_letters(value, text):
    assert figure(value) == text


def test_intervals_names_and_nested_figures():
    assert interval({"value": 0.5, "low": 0.25, "high": 0.75}) == "0.500 (0.250 to 0.750)"
    assert interval(None) == "-"
    assert words("tokens_per_second") == "tokens per second"
