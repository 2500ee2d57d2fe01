"""Do both sides compute the same? One update on one minibatch of all rows, gradients compared.

Run     python -m benchmarks.versus_trl.agreement FOLDER GRADIENTS      prints JSON
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.versus_trl.ours import build
from pipeline.ppo.passes import Lesson


def main() -> None:
    """Prints relative differences of advantages and of each model's gradient.

    The losses take TRL's advantages: it whitens by the sample's variance, we by the population's,
    which scales all of them by sqrt(n / (n - 1)). Meant for responses without EOS: where one ends,
    TRL puts the score on the padding after it.
    """
    folder, theirs = Path(sys.argv[1]), torch.load(sys.argv[2])
    content = json.loads((folder / "workload.json").read_text())
    trainer = build(folder, minibatch=len(content["prompts"]), epochs=1)
    gradients: dict[str, Tensor] = {}
    taken: dict[str, Tensor] = {}

    def estimate(experience, rewards) -> Lesson:  # noqa: ANN001 - the trainer's own
        lesson = type(trainer).estimate(trainer, experience, rewards)
        pad, width = content["pad"], max(len(prompt) for prompt in content["prompts"])
        rows = [[int(t) for t in row[:width] if t != pad] for row in theirs["ids"]]
        order = [rows.index(prompt) for prompt in experience.prompts]
        taken["ours"], taken["theirs"] = lesson.advantages, theirs["advantages"][order]
        return replace(lesson, advantages=taken["theirs"])

    def step_of(name: str):  # noqa: ANN202
        def step() -> None:
            for key, weight in trainer.optimiser.models[name].named_parameters():
                if weight.grad is not None:
                    gradients[f"{name}.{key}"] = weight.grad.clone()

        return step

    trainer.estimate = estimate
    for name, optimizer in trainer.optimiser.optimizers.items():
        optimizer.step = step_of(name)
    metrics = trainer.update(0).metrics
    loss = metrics["policy/loss"] + trainer.settings.optimisation.value_coef * metrics["value/loss"]
    figures = {
        "advantages": _difference([taken["ours"]], [taken["theirs"]]),
        "loss": abs(loss - theirs["loss"]),
    }
    for ours, peer in (("policy", "policy"), ("value", "value_model")):
        names = [key.removeprefix(f"{ours}.") for key in gradients if key.startswith(f"{ours}.")]
        figures[f"{ours}_gradient"] = _difference(
            [gradients[f"{ours}.{name}"] for name in names],
            [theirs[f"{peer}.{name}"] for name in names],
        )
    sys.stdout.write(json.dumps(figures))


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Norm of the difference as a share of the norm."""
    mine, other = (torch.cat([t.flatten().double() for t in side]) for side in (ours, theirs))
    return float((mine - other).norm() / other.norm())


if __name__ == "__main__":
    main()
