"""The real chain on the smoke recipe, every stage on two processes, with fewer steps.

It stands apart from test_chain.py so that two workers share what are the longest tests.
"""

import json
import re

from tests.chain import STAGES, closing_lines, copy_sources, make

FEW = {"steps": 4, "updates": 2}


def test_every_stage_runs_on_two_processes(tmp_path):
    checkout = copy_sources(tmp_path)
    for path in (checkout / "configs" / "smoke").iterdir():
        text = path.read_text()
        for name, count in FEW.items():
            text = re.sub(rf"^( *{name}): \d+$", rf"\1: {count}", text, flags=re.MULTILINE)
        path.write_text(text)
    result = make(checkout, "RUN=runs/two", "NPROC=2", "ARGS=--tracking=none")
    assert result.returncode == 0, result.stderr[-3000:]
    assert closing_lines(result) == STAGES
    for stage in STAGES:
        manifest = json.loads((checkout / "runs" / "two" / stage / "manifest.json").read_text())
        assert manifest["circumstances"]["num_processes"] == 2, stage
