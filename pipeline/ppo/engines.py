"""What samples responses: the policy itself, or vLLM with the policy's weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from pipeline.ppo.correction import mismatch, truncated_weights
from pipeline.ppo.engine_settings import Engine
from pipeline.ppo.passes import Lesson, precision_context
from pipeline.ppo.rollout import Sampled, generate
from pipeline.ppo.settings import Settings
from pipeline.ppo.vllm_engines import ColocatedEngine, ServerEngine
from pipeline.sharding import whole

if TYPE_CHECKING:
    from accelerate import Accelerator


@runtime_checkable  # the tests check types
class RolloutEngine(Protocol):
    """Samples responses by the policy's weights; all processes call it together."""

    def synchronise(self) -> None:
        """Takes up the policy's weights as they are now."""

    def sample(
        self, prompts: Sequence[list[int]], *, uniforms: Float[Tensor, "row position"]
    ) -> Sampled:
        """Returns one response per prompt of this process.

        Args:
            prompts: token ids.
            uniforms: one number per response token to draw it by, for an engine that can; their
                width is the budget.

        An engine that is not the policy itself says in `engine_logprobs` of the figures what it
        drew each token with, at the temperature of the settings.
        """


@dataclass(frozen=True)
class NativeEngine:
    """The policy itself, here."""

    policy: Any
    settings: Settings
    eos_id: int
    pad_id: int

    def synchronise(self) -> None:
        """Does nothing: it reads the policy's own weights."""

    def sample(
        self, prompts: Sequence[list[int]], *, uniforms: Float[Tensor, "row position"]
    ) -> Sampled:
        """Returns one response per prompt, drawn by the uniform numbers."""
        with (
            precision_context(self.settings.precision, self.policy.device),
            whole(self.policy) as policy,
        ):
            return generate(
                policy,
                prompts,
                uniforms=uniforms,
                temperature=self.settings.temperature,
                eos_id=self.eos_id,
                pad_id=self.pad_id,
                workers=self.settings.workers,
            )


def open_engine(
    policy: Any, *, settings: Settings, accelerator: "Accelerator", eos_id: int, pad_id: int
) -> RolloutEngine:
    """Returns the engine that the settings name.

    Raises:
        UserError: it is not there, or would not sample as the policy does.
    """
    if settings.engine.name == "native":
        return NativeEngine(policy, settings, eos_id, pad_id)
    if settings.engine.name == "vllm_server":
        return ServerEngine(policy, settings, eos_id=eos_id)
    return ColocatedEngine(policy, settings, accelerator=accelerator, eos_id=eos_id)


def corrected(lesson: Lesson, engine: Engine) -> tuple[Lesson, dict[str, float]]:
    """Returns the lesson with the weights of its tokens, and what is logged of the engine.

    Where the policy sampled itself there is nothing to correct, and nothing is logged.
    """
    experience = lesson.experience
    if experience.engine_logprobs is None:
        return lesson, {}
    ours, theirs, mask = experience.logprobs, experience.engine_logprobs, experience.mask
    level = "token" if engine.tis == "none" else engine.tis
    weights = truncated_weights(ours, theirs, mask, cap=engine.tis_cap, level=level)
    metrics = mismatch(ours, theirs, mask, weights, cap=engine.tis_cap)
    return (lesson if engine.tis == "none" else replace(lesson, weights=weights)), metrics
