"""A chat in the terminal with one model, or with two side by side.

Reads   any folder of a causal language model, such as runs/cpu/sft and runs/cpu/ppo.
Writes  to the terminal only.
Run     make chat                                  (the aligned model)
        make chat MODELS="runs/cpu/sft runs/cpu/ppo"
        python -m stages.chat --models runs/cpu/ppo --temperature=0.7

Every model remembers the conversation as it went on with that model. /new forgets it, /quit or the
end of the input leaves.
"""

import argparse
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from pipeline.command import Parser
from pipeline.config import require
from pipeline.context import context_of, fits
from pipeline.errors import UserError
from pipeline.terminal import forgive, printable, start_logging

GAP = "  |  "


@dataclass(frozen=True, kw_only=True)
class Config:
    """A chat."""

    models: tuple[str, ...]
    """Folders of one or two models."""
    temperature: float = 1.0
    """Divides the logits; 1 is what the models were trained and evaluated at."""
    max_response_tokens: int = 64
    """Length limit of a reply."""
    seed: int = 1
    """Seed of the replies; both models draw with the same numbers."""
    trust_remote_code: tuple[str, ...] = ()
    """Those of the folders whose own Python code may run; none unless named."""

    def __post_init__(self) -> None:
        require(1 <= len(self.models) <= 2, f"--models: one or two folders, got {len(self.models)}")
        require(self.temperature > 0, f"--temperature: must be above 0, got {self.temperature}")
        require(
            self.max_response_tokens >= 1,
            f"--max_response_tokens: must be at least 1, got {self.max_response_tokens}",
        )


@dataclass(kw_only=True)
class Speaker:
    """A model and the conversation it has had."""

    name: str
    model: Any
    tokenizer: Any
    history: list[dict[str, str]] = field(default_factory=list)

    def answer(self, text: str, *, config: Config, turn: int) -> str:
        """Returns the reply to a new message; the oldest exchanges go when they no longer fit.

        A message that does not even fit alone is told of, and nothing is forgotten for it.
        """
        from pipeline.evaluation.sampling import Sampling, sample
        from pipeline.tokenizer import encode_prompt

        messages = [*self.history, {"role": "user", "content": text}]
        tokens = encode_prompt(self.tokenizer, messages)
        while not fits(self.model.config, len(tokens) + config.max_response_tokens):
            if len(messages) == 1:
                return (
                    f"(too long: the message takes {len(tokens)} tokens and a reply up to "
                    f"{config.max_response_tokens}, and this model reads "
                    f"{context_of(self.model.config)}; shorten it or lower --max_response_tokens)"
                )
            del messages[:2]
            tokens = encode_prompt(self.tokenizer, messages)
        sampling = Sampling(
            seed=config.seed,
            max_response_tokens=config.max_response_tokens,
            temperature=config.temperature,
        )
        replies = sample(
            self.model,
            tokenizer=self.tokenizer,
            prompts=[tokens],
            rows=[turn],
            draw=0,
            sampling=sampling,
        )
        self.history = [*messages, {"role": "assistant", "content": replies[0].text}]
        return replies[0].text


def load(config: Config) -> list[Speaker]:
    """Returns the models, each under its folder's name."""
    from transformers.utils.logging import disable_progress_bar

    from pipeline.evaluation.sampling import load_any
    from pipeline.pretrained import permit

    disable_progress_bar()
    permit(config.trust_remote_code)
    speakers = []
    for path in config.models:
        model, tokenizer = load_any(path)
        require(
            tokenizer.chat_template is not None,
            f"{path}: its tokenizer has no chat template, so it cannot chat",
        )
        speakers.append(Speaker(name=path.rstrip("/"), model=model, tokenizer=tokenizer))
    return speakers


def columns(texts: Sequence[str], *, width: int) -> str:
    """Returns one text wrapped to the width, or two in columns side by side."""
    share = (width - len(GAP) * (len(texts) - 1)) // len(texts)
    wrapped = [textwrap.wrap(printable(text), share) or [""] for text in texts]
    lines = zip_longest(*wrapped, fillvalue="")
    return "\n".join(GAP.join(part.ljust(share) for part in line).rstrip() for line in lines)


def converse(
    speakers: Sequence[Speaker],
    *,
    lines: Iterable[str],
    write: Callable[[str], object],
    config: Config,
) -> None:
    """Answers every line until /quit or the end of the lines.

    Args:
        speakers: one or two models.
        lines: what the user types.
        write: puts text on the terminal.
        config: how replies are drawn.
    """
    width = max(shutil.get_terminal_size().columns, 40)
    write(columns([speaker.name for speaker in speakers], width=width) + "\n\n> ")
    for turn, line in enumerate(lines):
        text = line.strip()
        if text == "/quit":
            break
        if text == "/new":
            for speaker in speakers:
                speaker.history.clear()
        elif text:
            replies = [speaker.answer(text, config=config, turn=turn) for speaker in speakers]
            write("\n" + columns(replies, width=width) + "\n\n")
        write("> ")
    write("\n")


def parse(argv: Sequence[str] | None) -> Config:
    """Returns the configuration of a command line."""
    parser = Parser(
        prog="python -m stages.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", nargs="+", required=True, metavar="FOLDER", help="one or two model folders"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (1)")
    parser.add_argument(
        "--max_response_tokens", type=int, default=64, help="length limit of a reply (64)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the replies (1)")
    parser.add_argument(
        "--trust_remote_code",
        nargs="+",
        default=(),
        metavar="FOLDER",
        help="those of the models whose own Python code may run, once you have read it",
    )
    values = vars(parser.parse_args(argv))
    folders = {name: tuple(values[name]) for name in ("models", "trust_remote_code")}
    return Config(**values | folders)


def run(config: Config) -> None:
    """Loads the models and talks."""

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    forgive(sys.stdin, sys.stdout)
    converse(load(config), lines=sys.stdin, write=write, config=config)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    start_logging(logging.WARNING)
    try:
        run(parse(argv))
    except UserError as error:
        logging.getLogger("stages.chat").error("chat: %s", error)
        return 2
    except KeyboardInterrupt:
        sys.stdout.write("\n")
    except BrokenPipeError:  # nobody reads on; Python must not try once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
