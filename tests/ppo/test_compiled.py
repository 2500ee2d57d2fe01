"""Compiled layers learn what layers learn as they are written, and say whether they pay."""

import pytest
import torch

from pipeline.errors import UserError
from pipeline.ppo import compiled
from pipeline.ppo.compiled import break_even
from pipeline.ppo.settings import Optimisation
from tests.ppo.worlds import trainer
from tests.support import assert_close

pytestmark = pytest.mark.filterwarnings("default")  # torch.compile warns of its own doings


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def moved(*, compiles: bool) -> torch.Tensor:
    """The weights of policy and critic after two updates by two workers."""
    rates = Optimisation(epochs=2, compile=compiles)
    ppo = trainer(packed=True, workers=2, microbatch_size=3, optimisation=rates)
    before = [set(vars(layer)) for layer in compiled._layers(ppo.roles)]
    ppo.update(0)
    ppo.update(1)
    assert [set(vars(layer)) - {"forward"} for layer in compiled._layers(ppo.roles)] == before
    parameters = [*ppo.roles.policy.parameters(), *ppo.roles.value.parameters()]
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def test_compiled_layers_learn_what_others_do(caplog):
    caplog.set_level("INFO")
    traced = torch._dynamo.utils.counters["stats"]
    traced.clear()
    plain = moved(compiles=False)
    assert not traced
    assert_close(moved(compiles=True), plain, tolerance=1e-6)
    assert traced["unique_graphs"] > 0
    told = [line for line in caplog.messages if "ppo: compiled in" in line]
    assert len(told) == 1


@pytest.mark.parametrize(
    ("seconds", "steps", "told"),
    [
        ((0.5, 0.4), 400, "it has paid after 300 of 400 steps"),
        ((0.5, 0.4), 200, "it pays after 300 steps, and there are 200; set optimisation.compile"),
        ((0.4, 0.4), 400, "it never pays here, set optimisation.compile to false"),
    ],
)
def test_when_compiling_has_paid(seconds, steps, told):
    plain, fast = seconds
    line = break_even(29.99, plain=plain, fast=fast, steps=steps)
    assert line.startswith(f"compiled in 30 s; a step takes 0.4 s instead of {plain}: {told}")


def test_a_processor_without_a_compiler_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="optimisation.compile: needs a C.. compiler .* on PATH"):
        trainer(packed=True, optimisation=Optimisation(compile=True))
