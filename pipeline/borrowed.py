"""A tokenizer taken from a model: what is checked, and what is mended knowingly."""

import json
import re
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import UserError, told
from pipeline.origin import load_origin_tokenizer, locate
from pipeline.templates import CHATML, Template
from pipeline.tokenizer import PAD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_SYSTEM = {"role": "system", "content": "Be brief."}
_USER = {"role": "user", "content": "Who is there?"}
_ASSISTANT = {"role": "assistant", "content": "It is me."}
PROBES = (
    [_USER],
    [_SYSTEM, _USER],
    [_USER, _ASSISTANT, _USER],
    [_SYSTEM, _USER, _ASSISTANT, _USER, _ASSISTANT],
)
"""Conversations that two templates must render alike to count as the same."""
RARE = "".join(map(chr, (*range(0x21, 0x250), 0x416, 0x5D0, 0x4E2D, 0x1F600)))
"""Characters of which a tokenizer that has unknown texts does not know all."""

NAMED_PAD = re.compile(r"(<|<\||\[)(pad|padding|finetune_right_pad_id)(>|\|>|\])", re.IGNORECASE)
"""A token that says it is a pad; the word pad is one that texts need."""


class Borrowed(NamedTuple):
    """A model's tokenizer, fit for this pipeline, and what was changed about it."""

    tokenizer: "Tokenizer"
    mended: tuple[str, ...]


def borrow_tokenizer(
    init_from: str, *, drop_default_system: bool = False, given: Template | None = None
) -> Borrowed:
    """Returns the tokenizer of a model, with a PAD of its own and a template that marks replies.

    Args:
        init_from: where the model lies; see `pipeline.origin.locate`.
        drop_default_system: leave out the system message that a ChatML template inserts where a
            conversation has none.
        given: the template that takes the place of the model's; None keeps that.

    Raises:
        UserError: there is no tokenizer, no chat template, no EOS, or a template that is not
            understood and either does not mark what the assistant writes or is to be changed.
    """
    tokenizer = load_origin_tokenizer(locate(init_from))
    mended = [] if given is None else _give(tokenizer, given)
    own = f"init_from: the chat template of {init_from}"
    where = f"chat_template: {given.name}" if given else own
    if not tokenizer.chat_template:
        raise UserError(
            f"init_from: the tokenizer of {init_from} has no chat template; set chat_template: "
            "plain, for a prompt that the model goes on with, is one"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"init_from: the tokenizer of {init_from} has no EOS token")
    with told(f"{where} fails"):
        template = _training_template(tokenizer, where, drop_default_system=drop_default_system)
    if template != tokenizer.chat_template:
        tokenizer.chat_template = template
        mended.append("the chat template marks what the assistant writes")
    if drop_default_system:
        mended.append("the chat template inserts no system message of its own")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        former, pad = tokenizer.pad_token, _own_pad(tokenizer)
        tokenizer.add_special_tokens({"pad_token": pad})
        mended.append(f"PAD is {pad}; it was {former or 'missing'}")
    return Borrowed(tokenizer, tuple(mended))


def _give(tokenizer: "Tokenizer", given: Template) -> list[str]:
    """Puts a template in the place of the tokenizer's own, and returns what that changed."""
    mended = [f"the chat template is {given.name}"]
    missing = [token for token in given.markers if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
        mended.append(f"{', '.join(missing)} are new tokens")
    if given.end and given.end != tokenizer.eos_token:
        mended.append(f"EOS is {given.end}; it was {tokenizer.eos_token or 'missing'}")
        tokenizer.eos_token = given.end
    first = tokenizer("")["input_ids"][:1]
    begins = given.built_in and first and first[0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{- bos_token -}}\n" * bool(begins) + given.text
    return mended


def _training_template(tokenizer: "Tokenizer", where: str, *, drop_default_system: bool) -> str:
    """Returns the template with generation markers: its own, TRL's patch of it, or our ChatML."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template: str = tokenizer.chat_template
    if not drop_default_system:
        if has_generation_markers(template):
            return template
        try:
            return get_training_chat_template(tokenizer) or template
        except ValueError:
            pass  # TRL does not know it
    system = default_system(tokenizer)
    if system is None and drop_default_system:
        raise UserError(
            "drop_default_system: the model's chat template is not plain ChatML, so what it "
            "inserts cannot be told apart; set it to false"
        )
    if system is None:
        raise UserError(
            f"{where} does not mark the assistant's tokens with generation markers, TRL knows no "
            "version that does, and it is not plain ChatML; add them to the template, or set "
            "chat_template to another"
        )
    return chatml("" if drop_default_system else system)


def chatml(system: str) -> str:
    """Returns a ChatML template with generation markers.

    Args:
        system: system message of conversations that bring none; empty inserts none.
    """
    if not system:
        return CHATML
    inserted = f"'<|im_start|>system\\n' + {json.dumps(system)} + '<|im_end|>\\n'"
    return (
        f"{{%- if messages[0]['role'] != 'system' -%}}{{{{- {inserted} -}}}}{{%- endif -%}}\n"
        + CHATML
    )


def default_system(tokenizer: "Tokenizer") -> str | None:
    """Returns the system message that a ChatML template inserts by itself, empty for none.

    None where the template is not ChatML: where `chatml` renders one of the probes otherwise.
    """
    from jinja2 import TemplateError

    try:
        before, _, _ = _render(tokenizer, [_USER]).partition("<|im_start|>user\n")
        system = before.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
        alike = all(
            _render(tokenizer, probe, template=chatml(system), prompt=prompt)
            == _render(tokenizer, probe, prompt=prompt)
            for probe in PROBES
            for prompt in (True, False)
        )
    except TemplateError:  # it refuses a probe: a system message, for instance
        return None
    return system if alike else None


def _render(
    tokenizer: "Tokenizer",
    messages: list[dict[str, str]],
    *,
    template: str | None = None,
    prompt: bool = False,
) -> str:
    """Returns the conversation as text, in the template given or in the tokenizer's own."""
    text: str = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    return text


def _own_pad(tokenizer: "Tokenizer") -> str:
    """Returns what becomes PAD: a token named so, else an UNK that nothing needs, else a new one.

    A token that the vocabulary already holds needs no new row in the model's embeddings.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    for token in sorted(vocabulary, key=lambda word: vocabulary[word]):
        if NAMED_PAD.fullmatch(token) and token != tokenizer.eos_token:
            return token
    unknown: str | None = tokenizer.unk_token
    if unknown is None or unknown == tokenizer.eos_token or unknown in tokenizer.chat_template:
        return PAD
    needed = tokenizer(RARE, add_special_tokens=False)["input_ids"]
    return PAD if tokenizer.unk_token_id in needed else unknown
