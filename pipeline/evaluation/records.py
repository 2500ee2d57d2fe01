"""What is measured on one prompt: a plain row that processes can exchange and files can hold."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A reply and every figure that is measured on it alone."""

    text: str
    num_tokens: int
    """Tokens of the reply, EOS included where it ended."""
    ended: bool
    """Whether the reply ended with EOS within the length limit."""
    gold: float
    """VADER compound."""
    reward: float
    """Normalised score of the reward model."""
    nll: float
    """-log P(reply | prompt) under the pretrained model, in nats."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One of the many SFT replies from which best-of-n chooses."""

    text: str
    gold: float
    reward: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """One prompt with the reply of each policy."""

    row: int
    prompt: str
    group: str
    sft: Judged
    ppo: Judged
    kl: float
    """KL(PPO || SFT) over the vocabulary, summed over PPO's reply, in nats."""
    k1: float
    """log PPO - log SFT of PPO's reply, in nats."""
    draws: tuple[Draw, ...] = ()
    """Further SFT replies, independent of `sft`; empty where best-of-n is not measured."""
