"""What a stage needs of a device, and at which of its moments."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.doctor.seen import Role


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes of one device at a moment of a stage."""

    moment: str
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    working: float = 0.0

    @property
    def live(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.working


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a stage needs.

    Attributes:
        stage: its name.
        peak: the moment that takes most.
        base: bytes of libraries, and what the allocator holds beyond live tensors.
        room: bytes that there are.
        seconds: of one unit.
        unit: step, update, or run.
        units: how many there will be; 0 where the rows decide.
        trained: bytes of the weights that move.
        roles: of ppo.
    """

    stage: str
    peak: Peak
    base: float
    room: float
    seconds: float
    unit: str
    units: int = 0
    trained: float = 0.0
    roles: Mapping[str, Role] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes of one process on its device."""
        return self.peak.live + self.base

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.total <= self.room
