"""Records of an evaluation that never ran."""

import random
from pathlib import Path
from typing import Any

from pipeline.evaluation.records import Draw, Judged, Record
from tests.support import tiny_llama

TEXT = "love you do like to play music what a great day it was fun oh no so bad"
WORDS = TEXT.split()


def judged(generator: random.Random, *, gain: float = 0.0, text: str | None = None) -> Judged:
    length = generator.randint(3, 9)
    return Judged(
        text=text or " ".join(generator.choices(WORDS, k=length)),
        num_tokens=length + 1,
        ended=generator.random() < 0.95,
        gold=max(-1.0, min(1.0, generator.gauss(0.2 + gain, 0.4))),
        reward=generator.gauss(2 * gain, 1.0),
        nll=3.0 * (length + 1),
    )


def records(count: int, *, draws: int = 4, seed: int = 0) -> list[Record]:
    """Records in which PPO is somewhat better than SFT, two prompts to a conversation."""
    generator = random.Random(seed)
    return [
        Record(
            row=row,
            prompt=f"how are you number {row}?",
            group=f"chat-{row // 2}",
            sft=judged(generator),
            ppo=judged(generator, gain=0.5),
            kl=generator.uniform(1, 5),
            k1=generator.uniform(0, 6),
            draws=tuple(
                Draw(text="hello", gold=generator.gauss(0.2, 0.4), reward=generator.gauss(0, 1))
                for _ in range(draws)
            ),
        )
        for row in range(count)
    ]


def tiny_tokenizer() -> Any:
    """A real tokenizer of ours on a few words."""
    from pipeline.tokenizer import train_tokenizer

    return train_tokenizer([TEXT] * 3, vocabulary_size=300)


def save_language_model(folder: Path, *, seed: int = 0, template: bool = True) -> Path:
    """Writes a plain folder of a tiny causal language model and returns it."""
    tokenizer = tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    tiny_llama(vocabulary=len(tokenizer), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
