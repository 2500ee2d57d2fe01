"""docs/security.md names tests that exist; docs/audit.md the versions that are installed."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from pipeline.data import packages
from pipeline.data.packages import Package

PROMISES = Path("docs/security.md").read_text(encoding="utf-8")
AUDIT = Path("docs/audit.md").read_text(encoding="utf-8")


def names_in(folder: str) -> set[str]:
    """The names of the tests of a folder."""
    sources = [path.read_text(encoding="utf-8") for path in Path(folder).rglob("test_*.py")]
    pattern = re.compile(r"^def (test_\w+)", re.MULTILINE)
    return {name for source in sources for name in pattern.findall(source)}


NAMED = set(re.findall(r"`(test_\w+)`", PROMISES))


def test_every_test_that_is_named_exists():
    assert len(NAMED) > 30
    assert not NAMED - names_in("tests")


def test_every_promise_names_a_test():
    rows = [row for row in PROMISES.splitlines() if row.startswith("| ")]
    promises = [row for row in rows if row != "| promise | where | test |"]
    assert len(rows) > len(promises) > 20
    assert not [row for row in promises if "`test_" not in row]


def test_the_audit_lists_every_direct_dependency_at_its_version():
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [word for words in project["optional-dependencies"].values() for word in words]
    lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for word in [*project["dependencies"], *extras]:
        name = Requirement(word).name
        assert f"| {name} | {pins[name.lower()]} |" in AUDIT, name


def test_every_archive_that_is_fetched_is_pinned_by_its_hash():
    pinned = [value for value in vars(packages).values() if isinstance(value, Package)]
    assert len(pinned) >= 3
    assert set(packages.MODELS) <= set(pinned)
    for package in pinned:
        assert re.fullmatch(r"[0-9a-f]{64}", package.sha256), package.name
        assert package.version in package.archive
        assert package.licence
    assert len({package.sha256 for package in pinned}) == len(pinned)
