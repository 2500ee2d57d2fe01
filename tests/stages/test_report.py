"""The report stage: one page from a finished run, and refusals before that."""

import shutil

import pytest

from pipeline.checkpoint import open_artifact
from stages.report import main
from tests.reporting.fakes import fake_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "invented")


def report(run, *words):
    return main([f"--run={run}", "--recipe=smoke", "--tracking=none", *words])


def test_the_page_is_the_artifact(finished, caplog):
    with caplog.at_level("INFO"):
        assert report(finished) == 0
    artifact = open_artifact(finished / "report", kind="report")
    assert {"index.html", "rollouts.html"} <= set(artifact.content["files"])
    assert set(artifact.content["parents"]) >= {"data", "ppo", "evaluate"}
    page = (finished / "report" / "index.html").read_text()
    assert "<h1>invented: SFT against PPO</h1>" in page
    assert 'href="rollouts.html"' in page
    assert "targets met" in caplog.text


def test_a_run_that_kept_no_rollout_has_no_page_of_them(tmp_path):
    run = fake_run(tmp_path / "run", rollouts=False)
    assert report(run) == 0
    assert not (run / "report" / "rollouts.html").exists()
    assert "rollouts.html" not in (run / "report" / "index.html").read_text()


def test_a_title_of_ones_own_is_escaped(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    assert report(run, "--title=<i>mine</i>") == 0
    page = (run / "report" / "index.html").read_text()
    assert "&lt;i&gt;mine&lt;/i&gt;" in page
    assert "<i>" not in page


@pytest.mark.parametrize("stage", ["data", "ppo", "evaluate"])
def test_a_missing_stage_is_named_with_its_command(finished, tmp_path, caplog, stage):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    shutil.rmtree(run / stage)
    assert report(run) == 2
    assert f"{stage} does not exist. Run: make {stage}" in caplog.records[-1].getMessage()
    assert not (run / "report").exists()


def test_an_unfinished_stage_is_named(finished, tmp_path, caplog):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    (run / "ppo" / "manifest.json").unlink()
    assert report(run) == 2
    assert "ppo has no manifest.json, so that stage did not finish" in caplog.text


def test_an_altered_result_is_refused(finished, tmp_path, caplog):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    results = run / "evaluate" / "results.json"
    results.write_text(results.read_text().replace("0.5", "0.9"))
    assert report(run) == 2
    assert "results.json was altered" in caplog.text


def test_a_run_without_a_reward_report_has_its_page(tmp_path):
    from pipeline.evaluation.comparison import compare
    from pipeline.reporting.content import page_content
    from pipeline.reporting.page import render
    from pipeline.storage import write_json
    from stages.report import PARENTS
    from tests.evaluation.fakes import records

    run = fake_run(tmp_path / "run")
    bare = compare(records(40, draws=0), sizes=[], bootstrap_samples=20, seed=0)
    artifacts = {name: open_artifact(run / name, kind=kind) for name, kind in PARENTS.items()}
    write_json(run / "evaluate" / "results.json", bare)
    html = render(page_content(artifacts, title="bare"))
    assert "No held-out ratings were evaluated." in html
    assert "Best-of-n was not measured." in html
