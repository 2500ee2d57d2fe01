"""What tests of the doctor ask for again is answered once: rehearsals, and settings of stages."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.doctor import needs
from stages import doctor

REHEARSALS = [name for name in vars(needs) if name.startswith("rehearse_")]
ANSWERS: dict[bytes, Any] = {}


@pytest.fixture(autouse=True)
def remembering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planners and the command remember across tests; rehearsals that are called by name do not."""
    for name in REHEARSALS:
        monkeypatch.setattr(needs, name, _rehearsed(getattr(needs, name)))
    monkeypatch.setattr(doctor, "load", _loaded)


def _rehearsed(act: Callable[..., Any]) -> Callable[..., Any]:
    def answer(blueprint: Any, ledger: Any, *args: Any, **options: Any) -> Any:
        key = pickle.dumps((act.__name__, blueprint, ledger.rates, args, options))
        if key not in ANSWERS:
            ANSWERS[key] = act(blueprint, ledger, *args, **options)
        return ANSWERS[key]

    return answer


def _loaded(schema: type, words: list[str], *, stage: str) -> Any:
    key = pickle.dumps((Path.cwd(), stage, words))
    if key not in ANSWERS:
        ANSWERS[key] = load(schema, words, stage=stage)
    return ANSWERS[key]


load = doctor.load
