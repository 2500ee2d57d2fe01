"""What samples the responses of a rollout: the settings of the engine."""

from dataclasses import dataclass
from typing import Any

from pipeline.config import require
from pipeline.lora import LoRA

ENGINES = ("native", "vllm_colocate", "vllm_server")
CORRECTIONS = ("token", "sequence", "none")
PLACES = ("server_url", "weights_dir", "timeout_seconds", "gpu_memory_frac", "sleep")
"""Settings that say where an engine lies and what it may take; what is learned is the same."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What samples the responses."""

    name: str = "native"
    """native: the policy itself, here; vllm_colocate: vLLM on the GPUs that train; vllm_server: a
    vLLM server elsewhere (docs/engines.md)."""
    tis: str = "token"
    """How samples of another engine are weighed (truncated importance sampling, Yao et al. 2025):
    token (each by its own ratio), sequence (by that of the whole response), or none."""
    tis_cap: float = 2.0
    """Largest weight, at least 1."""
    server_url: str = ""
    """Address of vllm_server, as in http://10.0.0.1:8000."""
    weights_dir: str = ""
    """Folder that this stage and vllm_server both see, through which it gets the weights; in
    memory (/dev/shm/...) where both are on one machine."""
    timeout_seconds: float = 1800.0
    """Longest that vllm_server may take over one rollout or over the weights."""
    gpu_memory_frac: float = 0.3
    """Share of each GPU's memory that vllm_colocate takes."""
    sleep: bool = False
    """Whether vllm_colocate gives that memory back while the models train; it then takes the
    weights again before every rollout."""

    def __post_init__(self) -> None:
        for name, choices in (("name", ENGINES), ("tis", CORRECTIONS)):
            value = getattr(self, name)
            require(
                value in choices,
                f"engine.{name}: must be one of {', '.join(choices)}, got {value!r}",
            )
        require(self.tis_cap >= 1, f"engine.tis_cap: must be at least 1, got {self.tis_cap}")
        require(
            self.timeout_seconds > 0,
            f"engine.timeout_seconds: must be positive, got {self.timeout_seconds}",
        )
        require(
            0 < self.gpu_memory_frac < 1,
            f"engine.gpu_memory_frac: must be between 0 and 1, got {self.gpu_memory_frac}",
        )
        for name in ("server_url", "weights_dir"):
            require(
                (self.name == "vllm_server") == bool(getattr(self, name)),
                f"engine.{name}: vllm_server needs it, and no other engine does",
            )
        require(
            self.server_url.startswith(("http://", "https://")) or not self.server_url,
            f"engine.server_url: must begin with http:// or https://, got {self.server_url!r}",
        )

    def content(self) -> dict[str, Any]:
        """The settings that decide what is learned."""
        return {key: value for key, value in vars(self).items() if key not in PLACES}


def check_engine(engine: Engine, *, lora: LoRA) -> None:
    """Raises UserError when an engine cannot be given the policy's weights."""
    require(
        engine.name == "native" or lora.quantise == "none",
        f"engine.name: {engine.name} takes whole weights, and lora.quantise has none; use native",
    )
