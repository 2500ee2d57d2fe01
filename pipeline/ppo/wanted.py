"""Which roles a run has, how they hold their weights, and what does not go together."""

from dataclasses import dataclass

from pipeline.config import require
from pipeline.lora import LoRA
from pipeline.ppo.settings import KL, Advantage, Optimisation

ROLES = ("separate", "trunk", "lora")
SHARDING = ("auto", "none", "fsdp2", "fsdp2_offload")
ATTENTION = ("auto", "fp32", "mixed", "bf16")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The roles of a run.

    Attributes:
        roles: separate, trunk or lora.
        lora: the policy's adapter, where roles is lora.
        seed: of its first weights.
        critic: whether there is a value model.
        normalise: whether scores and values are normalised by the reward model's constants.
        longest: most tokens of a prompt and its response together.
        sharding: none, fsdp2 or fsdp2_offload.
        precision: fp32 or bf16, in which divided weights are read.
        attention: how they attend under autocast, of `pipeline.attention.PRECISIONS`.
        recomputes: whether the layers of what is trained are computed again in backward passes.
    """

    roles: str
    lora: LoRA
    seed: int
    critic: bool
    normalise: bool
    longest: int
    sharding: str = "none"
    precision: str = "fp32"
    attention: str = "fp32"
    recomputes: bool = False


def check_roles(
    roles: str,
    *,
    lora: LoRA,
    kl: KL,
    advantage: Advantage,
    optimisation: Optimisation,
    updates: int,
) -> None:
    """Raises UserError when how the roles hold their weights does not go with other settings."""
    require(roles in ROLES, f"roles: must be one of {', '.join(ROLES)}, got {roles!r}")
    estimator, warmup = advantage.estimator, optimisation.critic_warmup
    if not advantage.needs_value_model:
        require(
            roles != "trunk",
            f"roles: trunk shares the policy with a critic, and {estimator} has none",
        )
        require(
            warmup == 0,
            f"optimisation.critic_warmup: {estimator} has no critic; set it to 0, not {warmup}",
        )
    require(
        warmup < updates,
        f"optimisation.critic_warmup: {warmup} of {updates} updates leave the policy none",
    )
    require(
        (roles == "lora") == (lora.rank > 0),
        f"lora.rank: roles lora needs it above 0, any other needs 0; got {lora.rank} with roles "
        f"{roles}",
    )
    require(
        roles != "lora" or kl.reference_rate == 0,
        "kl.reference_rate: with roles lora the reference is the frozen base; set it to 0, "
        f"not {kl.reference_rate}",
    )
    require(
        lora.dropout == 0,
        f"lora.dropout: ppo reads all models without; set it to 0, not {lora.dropout}",
    )


def check_sharding(
    sharding: str,
    *,
    roles: str,
    engine: str,
    num_processes: int,
    on_gpu: bool,
    compiles: bool = False,
) -> None:
    """Raises UserError when models cannot be divided over the processes as they are set.

    Args:
        sharding: none, fsdp2 or fsdp2_offload.
        roles: how they hold their weights.
        engine: what samples the responses.
        num_processes: how many there are.
        on_gpu: whether the models compute on GPUs.
        compiles: whether layers go through torch.compile.
    """
    require(
        sharding == "none" or num_processes > 1,
        f"sharding: {sharding} divides models over processes, and there is one; set it to none",
    )
    require(
        sharding == "none" or roles == "separate",
        f"sharding: {sharding} divides models of their own, not those of roles {roles}. Set roles "
        "to separate, or keep whole models (configs/accelerate/ddp.yaml)",
    )
    require(
        sharding == "none" or engine == "native",
        f"engine.name: {engine} takes whole weights, and sharding {sharding} divides them. Set it "
        "to native, or keep whole models (configs/accelerate/ddp.yaml)",
    )
    require(
        sharding == "none" or not compiles,
        f"optimisation.compile: takes whole layers, and sharding {sharding} divides them. Set it "
        "to false, or keep whole models (configs/accelerate/ddp.yaml)",
    )
    require(
        sharding != "fsdp2_offload" or on_gpu,
        "sharding: fsdp2_offload moves weights to a GPU for each layer, and there is none; set it "
        "to fsdp2",
    )
