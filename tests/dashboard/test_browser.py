"""The page in a real browser: it shows what a run holds, and obeys none of it."""

import re
import subprocess
import threading
from urllib.parse import quote

import pytest

from pipeline.dashboard.server import serve
from tests.dashboard.runs import finished, held, log, trained
from tests.security.test_pages import ATTACK, ATTACKS, CHROMIUM, OWNED, Tags

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

NAME = f"<img src=x onerror={OWNED}>"
"""Name of a run's folder."""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A dashboard of two runs in which everything that has a text is hostile."""
    root = tmp_path_factory.mktemp("runs")
    for name in (NAME, "other"):
        ppo = finished(root / name / "ppo", summary={ATTACK: ATTACK}, title=ATTACK + name, seed=1)
        log(ppo, "metrics.jsonl", *({"step": s, f"{ATTACKS[0]}/x": s, "a/b": 2} for s in (1, 2, 3)))
        log(ppo, "samples.jsonl", {"step": 3, "prompt": ATTACK, ATTACK: ATTACK, "score": 1.5})
        with (ppo / "metrics.jsonl").open("a") as file:
            file.write("{ broken\n")
        finished(root / name / "evaluate", summary={"gold_win_rate": ATTACK})
        (root / name / "sft").mkdir()
        (root / name / "sft" / "manifest.json").write_text(f'{{"content": "{ATTACKS[0]}"}}')
        trained(root / name / "reward", steps=5, of=20)
        held(root / name / "reward", host=NAME, since=1.0)
    with serve(root, host="127.0.0.1", port=0, names=()) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def seen(address, place, folder):
    """The page as the browser has it after it has loaded, asked, and drawn."""
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2500"]
    words += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"{address}/#/{place}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.parametrize(
    ("place", "title", "words"),
    [
        ("", "Runs", ["5 of 20", "gold win rate", "live", NAME]),
        (f"run/{quote(NAME)}/ppo", f"{NAME} · ppo", ["line 4 damaged", "Settings", "score 1.5"]),
        (
            f"compare/ppo/{quote(NAME)}/other",
            "2 runs · ppo",
            ["Settings that differ", "Figures", "a/b"],
        ),
    ],
)
def test_everything_is_shown_and_nothing_is_obeyed(address, tmp_path, place, title, words):
    html = seen(address, place, tmp_path)
    page = Tags(html)
    assert title in page.text
    assert "<title>OWNED" not in html
    for word in words:
        assert word in " ".join(page.text.split())
    assert not {"img", "iframe", "object", "embed", "base", "form", "style"} & page.tags
    assert html.count("<script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "srcdoc"]
    for name, value in page.attributes:
        if name in ("href", "src"):
            assert re.match(r"(#/|/style\.css$|/app\.js$|data:,$|/report/)", value), value
