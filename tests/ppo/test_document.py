"""docs/ppo.md names tests and places that exist."""

import re
from pathlib import Path

TEXT = Path("docs/ppo.md").read_text(encoding="utf-8")


def names(kind: str, folder: str) -> set[str]:
    sources = [path.read_text(encoding="utf-8") for path in Path(folder).rglob("*.py")]
    return {name for source in sources for name in re.findall(rf"{kind} (\w+)", source)}


def test_every_test_it_names_exists():
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) > 40
    assert named <= names("def", "tests")


def test_every_place_it_names_exists():
    places = re.findall(r"`(\w+)\.([\w.]+)`", TEXT)
    modules = {path.stem for path in Path("pipeline").rglob("*.py")}
    named = [last for first, rest in places if first in modules for last in rest.split(".")]
    settings = [Path("pipeline/ppo/settings.py"), Path("pipeline/lora.py")]
    fields = re.findall(r"^    (\w+):", "".join(p.read_text() for p in settings), re.MULTILINE)
    known = names("def", "pipeline") | names("class", "pipeline") | {"py", *fields}
    assert len(named) > 20
    assert not [name for name in named if name not in known]
