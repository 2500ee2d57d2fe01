"""Chat templates that a model can be given: built in by name, or from a file."""

from pathlib import Path
from typing import NamedTuple

from pipeline.config import require
from pipeline.errors import told

SUFFIX = ".jinja"


class Template(NamedTuple):
    """A chat template with what it needs of a tokenizer.

    Attributes:
        name: as the setting has it.
        text: Jinja, with generation markers around a reply and its end.
        markers: tokens that part the messages; the tokenizer gets those that it lacks.
        end: token that ends a reply and becomes EOS; empty where that is the tokenizer's own EOS.
        built_in: whether it begins with BOS where the tokenizer itself puts that first.
    """

    name: str
    text: str
    markers: tuple[str, ...] = ()
    end: str = ""
    built_in: bool = False


CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] | trim + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] | trim + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
"""`<|im_start|>role\\ncontent<|im_end|>\\n` for each message; the reply is marked."""

LLAMA3 = """\
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] | trim + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}"""
"""`<|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>` for each message."""

PLAIN = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- ' ' + message['content'] | trim + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] | trim -}}
{%- if message['role'] == 'system' -%}{{- '\\n\\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}"""
"""The prompt as it stands, a space, the reply, EOS: a text that a base model goes on with."""

BUILT_IN = {
    "chatml": Template("chatml", CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", True),
    "llama3": Template(
        "llama3",
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        True,
    ),
    "plain": Template("plain", PLAIN, built_in=True),
}


def check_name(chat_template: str) -> None:
    """Raises UserError unless the setting names a built-in template or a template's file."""
    require(
        chat_template in ("", *BUILT_IN) or chat_template.endswith(SUFFIX),
        f"chat_template: must be one of {', '.join(BUILT_IN)} or a {SUFFIX} file, "
        f"got {chat_template!r}",
    )


def template_file(chat_template: str, *, recipe: str) -> Path | None:
    """Returns the file that the setting names, first looked for beside the recipe's YAML."""
    if not chat_template.endswith(SUFFIX):
        return None
    beside = Path("configs") / recipe / chat_template
    return beside if beside.is_file() else Path(chat_template)


def read_template(chat_template: str, *, recipe: str) -> Template | None:
    """Returns the template that the setting names; None where it is empty.

    Raises:
        UserError: its file cannot be read, or is empty.
    """
    path = template_file(chat_template, recipe=recipe)
    if path is None:
        return BUILT_IN.get(chat_template)
    with told(f"chat_template: neither {path} nor one beside configs/{recipe}/*.yaml can be read"):
        text = path.read_text()
    require(bool(text.strip()), f"chat_template: {path} is empty")
    return Template(chat_template, text)
