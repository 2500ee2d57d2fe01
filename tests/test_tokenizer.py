"""The tokenizer: round trips, and the template token by token."""

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl.chat_template_utils import (
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
)

from pipeline.tokenizer import (
    ASSISTANT,
    END,
    PAD,
    SMALLEST_VOCABULARY,
    SYSTEM,
    USER,
    decode_response,
    encode_conversation,
    encode_prompt,
    encode_response,
    train_tokenizer,
)

TEXTS = ["hello there, how are you?", "I am fine, thank you", "hello hello hello"] * 5
TOKENIZER = train_tokenizer(TEXTS, vocabulary_size=SMALLEST_VOCABULARY + 20)
MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": " hello "},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "fine\n"},
]


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def special(*tokens: str) -> list[int]:
    return TOKENIZER.convert_tokens_to_ids(list(tokens))


def test_special_tokens():
    assert TOKENIZER.pad_token == PAD
    assert TOKENIZER.eos_token == END
    assert TOKENIZER.bos_token is None
    assert special(PAD, END, SYSTEM, USER, ASSISTANT) == [0, 1, 2, 3, 4]
    assert len(TOKENIZER) == SMALLEST_VOCABULARY + 20


@given(st.text())
def test_every_text_round_trips(text):
    text = text.strip()
    if "<|" not in text:
        assert decode_response(TOKENIZER, encode_response(TOKENIZER, text)) == text


def test_prompt_ends_where_the_reply_begins():
    expected = [*special(USER), *ids_of("hello"), *special(END, ASSISTANT)]
    assert encode_prompt(TOKENIZER, "hello") == expected
    assert encode_prompt(TOKENIZER, [{"role": "user", "content": " hello"}]) == expected


def test_prompt_and_response_make_the_conversation():
    ids, _ = encode_conversation(TOKENIZER, MESSAGES)
    prompt = encode_prompt(TOKENIZER, MESSAGES[:4])
    assert prompt + encode_response(TOKENIZER, "fine") == ids
    assert encode_response(TOKENIZER, MESSAGES[4:]) == encode_response(TOKENIZER, "fine")


def test_conversation_marks_what_the_assistant_writes():
    ids, is_response = encode_conversation(TOKENIZER, MESSAGES)
    marked = [token for token, mark in zip(ids, is_response, strict=True) if mark]
    assert marked == [*ids_of("hi"), *special(END), *ids_of("fine"), *special(END)]


def test_decoding_stops_at_the_end():
    ids = [*ids_of(" hello"), *special(END, PAD), *ids_of("more")]
    assert decode_response(TOKENIZER, ids) == "hello"
    assert decode_response(TOKENIZER, special(PAD) + ids_of("hello")) == "hello"
    assert decode_response(TOKENIZER, []) == ""


def test_training_is_repeatable():
    again = train_tokenizer(TEXTS, vocabulary_size=SMALLEST_VOCABULARY + 20)
    assert again.get_vocab() == TOKENIZER.get_vocab()


def test_plain_auto_tokenizer_loads_the_folder(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_conversation(loaded, MESSAGES) == encode_conversation(TOKENIZER, MESSAGES)
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)


def test_trl_needs_no_patch():
    assert get_training_chat_template(TOKENIZER) is None
    assert is_chat_template_prefix_preserving(TOKENIZER)
    assert is_chat_template_stop_token_trained(TOKENIZER)
