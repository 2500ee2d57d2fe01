"""What the dashboard's page is told, as plain JSON values: runs, curves, samples, differences."""

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.dashboard.logs import NO_CURVES, Log, Points, is_finite, newest_rows
from pipeline.dashboard.runs import SHOWN, Runs, Stage
from pipeline.errors import UserError
from pipeline.points import POINT
from pipeline.reporting.grouping import grouped
from pipeline.shapes import is_object
from pipeline.spacing import evenly_spaced
from pipeline.storage import CHECKPOINTS, flatten, inside, read_json

MOST_POINTS = 500
"""Points of a curve that are sent; a chart is hardly wider."""
MOST_LOGS = 128
"""Logs that are kept in memory, the last ones asked for."""
MOST_COMPARED = 12
"""Runs that are compared at once: more colours cannot be told apart."""
PAGES = ("index.html", "rollouts.html")
"""What a report's folder holds."""
MOST_SAMPLES = 24
SAMPLE_BYTES = 2**22
"""Bytes of the end of samples.jsonl that are looked at."""
LONGEST_TEXT = 4000
"""Signs of a text that are shown."""
LONGEST_LIST = 8
HEADLINES = ("gold_win_rate", "kl", "distinct_2_ratio", "reward_accuracy", "minutes")
"""Figures of a finished evaluation, or of seeds, that stand on a run's card."""


class Unknown(Exception):  # noqa: N818 - an answer, not an error
    """There is no run or stage of that name."""


class Views:
    """Answers the page's questions about the runs below a root."""

    def __init__(self, root: Path) -> None:
        self.runs = Runs(root)
        self._logs: OrderedDict[Path, Log] = OrderedDict()
        self._lock = threading.Lock()

    def overview(self) -> dict[str, Any]:
        """Returns every run with the state of its stages, those at work first, then the newest."""
        told = [self._card(name, folder) for name, folder in self.runs.found().items()]
        told.sort(key=lambda run: (not run["running"], -run["touched"]))
        return {"root": str(self.runs.root), "now": time.time(), "runs": told}

    def _card(self, name: str, folder: Path) -> dict[str, Any]:
        stages = self.runs.stages(folder)
        headline: dict[str, Any] = next(
            (one.manifest["circumstances"]["summary"] for one in stages if _has_headline(one)), {}
        )
        return {
            "name": name,
            "running": any(one.state == "running" for one in stages),
            "touched": max((one.touched for one in stages), default=0.0),
            "stages": [_brief(one) for one in stages],
            "headline": {key: headline[key] for key in HEADLINES if key in headline},
        }

    def run(self, name: str) -> dict[str, Any]:
        """Returns a run with all that is known of its stages, curves and samples aside."""
        stages = self.runs.stages(self._folder(name))
        return {"name": name, "now": time.time(), "stages": [self._whole(one) for one in stages]}

    def curves(self, names: Sequence[str], stage: str) -> dict[str, Any]:
        """Returns a stage's charts with the curves of one run or of several, and remarks.

        Runs without the stage have no curves.
        """
        if stage not in SHOWN:
            raise Unknown
        charts: dict[str, list[dict[str, Any]]] = {}
        remarks = []
        for name in names[:MOST_COMPARED]:
            found, told = self._curves(name, stage)
            remarks += [f"{name}: {remark}" if len(names) > 1 else remark for remark in told]
            for title, parts in grouped(found).items():
                charts.setdefault(title, []).extend(
                    {"run": name, "label": label, "x": found[metric][0], "y": found[metric][1]}
                    for label, metric in parts.items()
                )
        if len(names) > MOST_COMPARED:
            remarks.append(f"only the first {MOST_COMPARED} of {len(names)} runs are shown")
        drawn = [
            {"title": title, "lines": lines}
            for title, lines in charts.items()
            if any(len(line["x"]) > 1 for line in lines)
        ]
        return {"charts": drawn, "remarks": remarks}

    def _curves(self, run: str, name: str) -> tuple[dict[str, Points], list[str]]:
        found: dict[str, Points] = {}
        remarks: list[str] = []
        stage = self._found(run, name)
        if stage is None:
            return found, remarks
        for file in ("metrics.jsonl", "timings.jsonl"):
            curves, told = self._log(self._place(stage, file)).points(most=MOST_POINTS)
            found |= curves
            remarks += told
        return found, remarks

    def _log(self, path: Path) -> Log:
        with self._lock:
            log = self._logs.pop(path, None) or Log(path)
            self._logs[path] = log
            while len(self._logs) > MOST_LOGS:
                self._logs.popitem(last=False)
            return log

    def samples(self, name: str, stage: str, step: float | None) -> dict[str, Any]:
        """Returns samples of one step, the newest unless told, and the steps that have some."""
        path = self._place(self._stage(name, stage), "samples.jsonl")
        rows = [row for row in newest_rows(path, size=SAMPLE_BYTES) if is_object(row)]
        steps = sorted({row["step"] for row in rows})
        chosen = step if step in steps else max(steps, default=None)
        of_step = [row for row in rows if row["step"] == chosen]
        shown = [of_step[place] for place in evenly_spaced(len(of_step), MOST_SAMPLES)]
        return {
            "steps": steps,
            "step": chosen,
            "num_rows": len(of_step),
            "rows": [_sample(row) for row in shown],
        }

    def comparison(self, names: Sequence[str], stage: str) -> dict[str, Any]:
        """Returns the stages that the runs have, figures of one stage, and settings that differ."""
        chosen = names[:MOST_COMPARED]
        stages = {name: self.runs.stages(self._folder(name)) for name in chosen}
        there = {one.name: None for some in stages.values() for one in some if one.touched}
        of_stage = {
            name: self._whole(one)
            for name, some in stages.items()
            for one in some
            if one.name == stage
        }
        settings = [one["settings"] for one in of_stage.values() if one["settings"]]
        keys = dict.fromkeys(key for some in settings for key in some)
        differing = [key for key in keys if len({str(some.get(key)) for some in settings}) > 1]
        return {
            "stages": list(there),
            "runs": [{**of_stage.get(name, {"state": "missing"}), "name": name} for name in chosen],
            "differing": differing,
        }

    def page_of(self, name: str, file: str) -> Path:
        """Returns the place of a page that a finished report wrote."""
        stage = self._stage(name, "report")
        if not self._place(stage, file).is_file():
            raise Unknown
        return self._place(stage, file)

    def _place(self, stage: Stage, name: str) -> Path:
        """Returns the place of a stage's file; a link must not lead out of the root."""
        place = (stage.folder / name).relative_to(self.runs.root)
        return inside(self.runs.root, place.as_posix())

    def _folder(self, name: str) -> Path:
        folder = self.runs.found().get(name)
        if folder is None:
            raise Unknown
        return folder

    def _stage(self, run: str, name: str) -> Stage:
        stage = self._found(run, name)
        if stage is None:
            raise Unknown
        return stage

    def _found(self, run: str, name: str) -> Stage | None:
        stages = self.runs.stages(self._folder(run))
        return next((stage for stage in stages if stage.name == name), None)

    def _whole(self, stage: Stage) -> dict[str, Any]:
        about = stage.manifest.get("circumstances", {})
        content = stage.manifest.get("content", {})
        return {
            **_brief(stage),
            "touched": stage.touched,
            "remarks": stage.remarks,
            "minutes": about.get("wall_seconds", 0) / 60,
            "memory": about.get("peak_memory_gib", 0),
            "finished": str(about.get("finished", "")),
            "commit": str(about.get("git_commit", "")),
            "figures": _plain(flatten(about.get("summary", {})) or self._newest_figures(stage)),
            "settings": _plain(flatten(content.get("config") or self._settings(stage))),
            "pages": [page for page in PAGES if self._has_page(stage, page)],
        }

    def _has_page(self, stage: Stage, page: str) -> bool:
        return stage.name == "report" and self._place(stage, page).is_file()

    def _newest_figures(self, stage: Stage) -> dict[str, Any]:
        """Returns each metric as it was logged last, of a stage that has not finished."""
        latest: dict[str, Any] = {}
        if stage.state in ("running", "stopped"):
            for row in filter(is_object, newest_rows(self._place(stage, "metrics.jsonl"))):
                latest |= {name: value for name, value in row.items() if name not in NO_CURVES}
        return flatten(latest)

    def _settings(self, stage: Stage) -> dict[str, Any]:
        """Returns the settings of an unfinished stage, which its newest resume point knows."""
        if stage.point is None:
            return {}
        try:
            record = read_json(self._place(stage, f"{CHECKPOINTS}/step-{stage.point}/{POINT}"))
        except (OSError, UserError):
            return {}
        config: Any = record.get("config") if isinstance(record, dict) else None
        return config if is_object(config) else {}


def _has_headline(stage: Stage) -> bool:
    return stage.state == "finished" and stage.name in ("evaluate", "seeds")


def _brief(stage: Stage) -> dict[str, Any]:
    names = ("name", "state", "step", "of", "seconds_per_step", "since", "point")
    told = {name: getattr(stage, name) for name in names}
    return told | {"seconds_left": stage.seconds_left}


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the texts and the numbers of a sample, by their names."""
    flat = flatten({name: value for name, value in row.items() if name != "step"})
    flat = _plain({name: value for name, value in flat.items() if not isinstance(value, list)})
    texts = {name: value for name, value in flat.items() if isinstance(value, str)}
    return {"texts": texts, "numbers": {k: v for k, v in flat.items() if k not in texts}}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by name as JavaScript can read them: numbers, and texts of some length."""
    return {str(name): _shown(value) for name, value in values.items()}


def _shown(value: Any) -> Any:
    match value:
        case None | bool():
            return value
        case list():
            text = ", ".join(map(str, value[:LONGEST_LIST]))
            return _shown(f"{text} …" if len(value) > LONGEST_LIST else text)
        case int() | float():
            return value if is_finite(value) else str(value)
        case _:
            text = str(value)
            return f"{text[:LONGEST_TEXT]} …" if len(text) > LONGEST_TEXT else text
