"""What gets installed: exact pins for everything, ranges in pyproject.toml, a known licence."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
LINES = [
    line for line in Path("constraints.txt").read_text().splitlines() if line and line[0] != "#"
]


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


PINS = {normal(name): version for name, version in (line.split("==") for line in LINES)}


def requirements(*extras: str) -> list[Requirement]:
    """Our own requirements, those of the named extras included."""
    optional = PROJECT["optional-dependencies"]
    words = PROJECT["dependencies"] + [word for extra in extras for word in optional[extra]]
    return [Requirement(word) for word in words]


def installed_tree() -> dict[str, str]:
    """Name and version of everything our requirements bring with them here."""
    tree: dict[str, str] = {}
    waiting = [(requirement, frozenset(requirement.extras)) for requirement in requirements("dev")]
    seen = set()
    while waiting:
        requirement, extras = waiting.pop()
        name = normal(requirement.name)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        tree[name] = metadata.version(name)
        for needed in map(Requirement, metadata.requires(name) or []):
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras)):
                waiting.append((needed, frozenset(needed.extras)))
    return tree


def test_every_pin_is_exact_and_served_by_every_index():
    for line in LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line


def test_no_pin_has_a_local_suffix_or_path():
    assert not [line for line in LINES if "+" in line or "@" in line or "/" in line]


def test_everything_installed_is_pinned_at_its_version():
    for name, version in installed_tree().items():
        assert PINS.get(name) == version.partition("+")[0], name


def test_the_pins_lie_within_our_ranges():
    for requirement in requirements(*PROJECT["optional-dependencies"]):
        assert requirement.specifier, f"{requirement.name} has no range"
        assert requirement.specifier.contains(PINS[normal(requirement.name)]), requirement


def test_the_distribution_is_ours():
    assert PROJECT["name"] == "rlhf-pipeline"
    assert PROJECT["license"] == "Apache-2.0"
    assert "3.11" in SpecifierSet(PROJECT["requires-python"])
    assert "3.10" not in SpecifierSet(PROJECT["requires-python"])
    assert "Apache License" in Path("LICENSE").read_text()
