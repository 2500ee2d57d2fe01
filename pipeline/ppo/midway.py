"""An update that was left between two optimizer steps."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.ppo.experience import Experience


@dataclass
class Midway:
    """An update under way: its rollout, measured, and what its optimizer steps have reported.

    Nothing else is needed to go on with it: what it was made with, the coefficient of the penalty
    and the baseline, moves when the update is done.
    """

    experience: Experience
    timings: dict[str, float]
    steps: list[dict[str, float]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Returns what a resume point keeps of it."""
        return {**vars(self), "experience": vars(self.experience)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Midway":
        """Returns what a resume point has kept."""
        return cls(**{**state, "experience": Experience(**state["experience"])})
