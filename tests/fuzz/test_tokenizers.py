"""Tokenizer folders of anything: one that works, or one line before a model is loaded."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.borrowed import borrow_tokenizer
from pipeline.corpus import encode_documents
from pipeline.instructions import encode_rows
from pipeline.models import load_tokenizer
from pipeline.reward.reading import load_reading
from pipeline.tokenizer import (
    decode_response,
    encode_conversation,
    encode_prompt,
    encode_response,
)
from tests.evaluation.fakes import tiny_tokenizer
from tests.fuzz.support import ODD_TEXTS, as_json, damaged, damaged_bytes, fuzz, one_line, texts

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CONVERSATION = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what a great day"},
    {"role": "assistant", "content": "it was fun"},
]
TEMPLATES = (
    "",
    "{{",
    "{{ raise_exception('no') }}",
    "{{ messages[9].content }}",
    "{{ 1 / 0 }}",
    "{% for %}",
    "{{ messages | tojson }}",
    "{{ nothing.at.all }}",
    "plain",
    "{% generation %}x{% endgeneration %}",
    "{{ messages[0]['content'] }}",
    "{{ (1).__class__ }}",
    "{% include 'x' %}",
    "{{ 'a' + 1 }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ messages.append(1) }}",
    "\ud800",
    "\0",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x<|end|>",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole tokenizer's folder."""
    path = tmp_path_factory.mktemp("tokenizer") / "whole"
    tiny_tokenizer().save_pretrained(path)
    return path


def damaged_folder(folder, name: str, content: bytes):
    copied = folder.with_name("damaged")
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(folder, copied)
    (copied / name).write_bytes(content)
    return copied


def use(tokenizer) -> None:
    """Does with a tokenizer what stages do with it."""
    document = {"messages": CONVERSATION}
    for action in (
        lambda: encode_prompt(tokenizer, "what a day"),
        lambda: encode_prompt(tokenizer, CONVERSATION[:2]),
        lambda: encode_response(tokenizer, "it was fun"),
        lambda: encode_conversation(tokenizer, CONVERSATION)[0],
        lambda: encode_documents(tokenizer, [document, {"text": "love you"}])[0],
        lambda: encode_rows(tokenizer, [document, {"prompt": "a", "completion": "b"}])[0].input_ids,
    ):
        ids = one_line(action)
        assert ids is None or (ids and all(0 <= token < len(tokenizer) for token in ids))
    assert isinstance(decode_response(tokenizer, [5, 6, 7, tokenizer.eos_token_id]), str)


@pytest.mark.parametrize("name", FILES)
@fuzz(12, share=0.5)
@given(data=st.data())
def test_a_damaged_tokenizer_works_or_is_refused(folder, name, data):
    whole = (folder / name).read_bytes()
    if name.endswith(".json") and data.draw(st.booleans()):
        content = as_json(data.draw(damaged(json.loads(whole))))
    else:
        content = data.draw(damaged_bytes(whole))
    copied = damaged_folder(folder, name, content)
    tokenizer = one_line(lambda: load_tokenizer(copied))
    if tokenizer is not None:
        use(tokenizer)


@pytest.mark.parametrize("template", TEMPLATES, ids=ascii)
def test_any_template_works_or_is_refused(folder, template):
    content = template.encode("utf-8", "surrogatepass")
    copied = damaged_folder(folder, "chat_template.jinja", content)
    tokenizer = one_line(lambda: load_tokenizer(copied))
    if tokenizer is not None:
        use(tokenizer)
    reading = one_line(lambda: load_reading(copied))
    if reading is not None:
        one_line(lambda: reading.exchange("what a day", "fun"))
    borrowed = one_line(lambda: borrow_tokenizer(str(copied)))
    if borrowed is not None:
        use(borrowed.tokenizer)


@pytest.mark.parametrize("text", ODD_TEXTS, ids=lambda text: ascii(text)[:20])
def test_odd_texts_are_read_or_refused(folder, text):
    tokenizer = load_tokenizer(folder)
    for action in (
        lambda: encode_prompt(tokenizer, text),
        lambda: encode_response(tokenizer, text),
        lambda: encode_rows(tokenizer, [{"prompt": text, "completion": text}]),
    ):
        one_line(action)


@fuzz(30)
@given(said=texts)
def test_what_is_said_comes_back(folder, said):
    tokenizer = load_tokenizer(folder)
    ids = one_line(lambda: encode_response(tokenizer, said))
    if ids is not None and "<|" not in said:
        assert decode_response(tokenizer, ids) == said.strip()
