"""Borrowed tokenizers: what is mended, what is refused, and that the model's format stays."""

import pytest
from transformers import AutoTokenizer
from trl.chat_template_utils import (
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
)

from pipeline.borrowed import borrow_tokenizer, chatml, default_system
from pipeline.errors import UserError
from pipeline.tokenizer import (
    END,
    PAD,
    SMALLEST_VOCABULARY,
    encode_conversation,
    encode_prompt,
    encode_response,
    train_tokenizer,
)
from tests import gguf_files

TEXTS = ["hello there, how are you?", "I am fine, thank you", "hello hello hello"] * 5
USER = {"role": "user", "content": "hi there"}
ASSISTANT = {"role": "assistant", "content": "hello {{ you }}"}
SYSTEM = {"role": "system", "content": "be kind"}
MESSAGES = [USER, ASSISTANT, USER, ASSISTANT]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_files.write_gguf(path, gguf_files.tiny_model())
    return path


@pytest.fixture(scope="module")
def own(gguf_file):
    """The tokenizer as the GGUF file brings it."""
    return AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)


def saved(tmp_path, **changes):
    """A folder with our tokenizer, changed as named."""
    tokenizer = train_tokenizer(TEXTS, vocabulary_size=SMALLEST_VOCABULARY)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_what_is_fit_is_taken_as_it_is(tmp_path):
    borrowed = borrow_tokenizer(saved(tmp_path))
    assert encode_conversation(borrowed.tokenizer, MESSAGES)[1].count(True) > 0
    assert borrowed.tokenizer.pad_token == PAD
    assert borrowed.mended == ()


def test_the_trap_is_real(own):
    assert own.pad_token == own.eos_token == "<|im_end|>"
    assert default_system(own) == 'You are "nice"'


@pytest.mark.parametrize("messages", [MESSAGES, [SYSTEM, *MESSAGES], [USER]])
@pytest.mark.parametrize("is_prompt", [True, False])
def test_the_mended_template_renders_what_the_models_own_does(gguf_file, own, messages, is_prompt):
    borrowed, mended = borrow_tokenizer(str(gguf_file))
    rendered, expected = (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
        for tokenizer in (borrowed, own)
    )
    assert rendered == expected
    assert mended[0] == "the chat template marks what the assistant writes"


def test_the_reply_and_its_end_are_marked_and_nothing_else(gguf_file):
    borrowed, _ = borrow_tokenizer(str(gguf_file))
    ids, is_response = encode_conversation(borrowed, MESSAGES)
    marked = [token for token, mark in zip(ids, is_response, strict=True) if mark]
    reply = borrowed(ASSISTANT["content"], add_special_tokens=False)["input_ids"]
    assert marked == [*reply, 2] * 2
    newline = borrowed("\n", add_special_tokens=False)["input_ids"]
    assert [*encode_prompt(borrowed, MESSAGES[:3]), *reply, 2, *newline] == ids
    assert encode_response(borrowed, ASSISTANT["content"]) == [*reply, 2]


def test_trl_needs_no_patch(gguf_file):
    borrowed, _ = borrow_tokenizer(str(gguf_file))
    assert get_training_chat_template(borrowed) is None
    assert is_chat_template_prefix_preserving(borrowed)
    assert is_chat_template_stop_token_trained(borrowed)


def test_the_default_system_message_can_be_left_out(gguf_file):
    borrowed, mended = borrow_tokenizer(str(gguf_file), drop_default_system=True)
    prompt = borrowed.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n"
    assert "be kind" in borrowed.apply_chat_template([SYSTEM, USER], tokenize=False)
    assert "the chat template inserts no system message of its own" in mended


def test_chatml_without_a_default_is_understood(own):
    own.chat_template, former = chatml(""), own.chat_template
    assert default_system(own) == ""
    own.chat_template = former


def test_pad_becomes_a_token_that_nothing_needs(gguf_file):
    borrowed, mended = borrow_tokenizer(str(gguf_file))
    assert (borrowed.pad_token, borrowed.pad_token_id) == ("<|endoftext|>", 0)
    assert (borrowed.eos_token_id, len(borrowed)) == (2, len(gguf_files.vocabulary()))
    assert mended[1] == "PAD is <|endoftext|>; it was <|im_end|>"


def test_pad_becomes_the_token_named_so(tmp_path):
    borrowed, mended = borrow_tokenizer(saved(tmp_path, pad_token=END))
    assert borrowed.pad_token == PAD
    assert mended == (f"PAD is {PAD}; it was {END}",)


def test_pad_is_added_where_texts_need_the_unknown_token(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "hello": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = (
        "{% for m in messages %}{% generation %}{{ m['content'] + '</s>' }}"
        "{% endgeneration %}{% endfor %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="</s>", chat_template=template
    ).save_pretrained(tmp_path)
    borrowed, mended = borrow_tokenizer(str(tmp_path))
    assert (borrowed.pad_token, borrowed.pad_token_id, len(borrowed)) == (PAD, 3, 4)
    assert mended == (f"PAD is {PAD}; it was missing",)


NO_SYSTEM = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": None}, "has no chat template; set chat_template"),
        ({"eos_token": None}, "has no EOS token"),
        ({"chat_template": "{{ messages[0]['content'] }}"}, "does not mark the assistant's"),
        ({"chat_template": NO_SYSTEM}, "and it is not plain ChatML"),
    ],
)
def test_what_is_unfit_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        borrow_tokenizer(saved(tmp_path, **changes))


def test_what_another_template_inserts_is_not_guessed(tmp_path):
    with pytest.raises(UserError, match="drop_default_system: .* is not plain ChatML"):
        borrow_tokenizer(saved(tmp_path), drop_default_system=True)


def test_nothing_to_borrow(tmp_path):
    with pytest.raises(UserError, match="init_from: no tokenizer at"):
        borrow_tokenizer(str(tmp_path))
