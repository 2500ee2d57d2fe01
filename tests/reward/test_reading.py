"""How models of other tokenizers read an exchange, token by token."""

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import head_of, load_with_new_head, pad_right, whole_text_scores
from pipeline.reward.reading import (
    ChatReading,
    PairReading,
    TokenReading,
    Words,
    cut_to,
    limit_of,
    load_reading,
    reread,
)
from pipeline.tokenizer import encode_prompt, encode_response, train_tokenizer
from tests.reward.encoders import save_encoder, word_pieces

TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "ok?"},
]


@pytest.fixture(scope="module")
def ours():
    return train_tokenizer(["hello there, friend"] * 5, vocabulary_size=300)


def pieces(reading, exchange) -> str:
    return " ".join(reading.tokenizer.convert_ids_to_tokens(exchange.ids))


def test_a_pair_has_two_segments_and_the_response_starts_after_the_first_separator():
    reading = PairReading(word_pieces())
    exchange = reading.exchange("hi", "yo!")
    assert pieces(reading, exchange) == "[CLS] h ##i [SEP] y ##o ! [SEP]"
    assert exchange.start == 4
    assert pieces(reading, reading.exchange("hi", "yo!", ended=False)).endswith("##o !")
    assert reading.exchange("hi", "").start == 4
    assert pieces(reading, reading.exchange(TURNS, "no")).startswith("[CLS] h ##i y ##o o ##k ?")
    padded = pad_right([exchange.ids, exchange.ids[:6]], pad_id=0, separator=reading.separator)
    assert padded["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0] * 4 + [1, 1, 0, 0]]
    expected = reading.tokenizer("hi", "yo!")
    assert padded["input_ids"][0].tolist() == expected["input_ids"]
    assert padded["token_type_ids"][0].tolist() == expected["token_type_ids"]


def test_a_conversation_is_what_the_models_own_template_writes(ours):
    reading = ChatReading(ours)
    exchange = reading.exchange(TURNS, "no")
    whole = [*TURNS, {"role": "assistant", "content": "no"}]
    assert exchange.ids == ours.apply_chat_template(whole, return_dict=False)
    assert exchange.start == len(encode_prompt(ours, TURNS))
    assert reading.exchange(TURNS, "no", ended=False).ids == exchange.ids[:-1]
    assert exchange == TokenReading(ours).exchange(TURNS, "no")  # our template closes with EOS
    closing = ChatReading(train_tokenizer(["hello there"] * 5, vocabulary_size=300))
    closing.tokenizer.chat_template = ours.chat_template + "{{- '!' -}}"
    assert pieces(closing, closing.exchange("hi", "no")).endswith("n o <|end|> Ġ !")


def test_rows_of_policy_tokens_are_read_anew_with_their_prompts_as_they_stood_in_the_data(ours):
    prompts = [encode_prompt(ours, "hi"), encode_prompt(ours, TURNS)]
    words = Words.behind(prompts, ["hi", TURNS], tokenizer=ours)
    responses = [encode_response(ours, "yo"), encode_response(ours, "no")[:-1]]
    reading = PairReading(word_pieces())
    first, second = reread(reading, words, prompts, responses)
    assert first == reading.exchange("hi", "yo").ids
    assert second == reading.exchange(TURNS, "no", ended=False).ids
    assert reread(TokenReading(ours), words, prompts, responses) == [
        prompt + response for prompt, response in zip(prompts, responses, strict=True)
    ]


def test_a_long_text_keeps_its_first_token_and_its_end():
    assert cut_to([[1, 2, 3, 4, 5], [1, 2]], limit=3) == [[1, 4, 5], [1, 2]]


def test_an_encoders_scores_are_its_own_forward_pass_whatever_the_batch(tmp_path):
    reading = load_reading(save_encoder(tmp_path))
    model = load_with_new_head(tmp_path, pad_id=0)
    assert limit_of(model.config, reading.tokenizer) == 64
    with torch.no_grad():
        assert float(head_of(model).weight.abs().max()) == 0.0  # a new head says 0
        head_of(model).weight.normal_(generator=torch.Generator().manual_seed(0))
    texts = [reading.exchange("hi", text).ids for text in ("yo!", "a", "what a day")]
    pairs = [
        reading.tokenizer("hi", text, return_tensors="pt") for text in ("yo!", "a", "what a day")
    ]
    expected = [float(model(**pair).logits.detach()) for pair in pairs]
    for size in (1, 3):
        found = whole_text_scores(
            model, texts, pad_id=0, separator=reading.separator, batch_size=size
        )
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_tokenizers_that_cannot_read_an_exchange_are_refused(tmp_path, ours):
    with pytest.raises(UserError, match="no tokenizer could be loaded from there"):
        load_reading(tmp_path / "none")
    for changes, message in (
        ({"pad_token": None}, "PAD must be a token of its own"),
        ({"chat_template": None}, "no chat template, and no special tokens for a pair"),
    ):
        broken = train_tokenizer(["hello there"] * 5, vocabulary_size=300)
        for name, value in changes.items():
            setattr(broken, name, value)
        folder = tmp_path / next(iter(changes))
        broken.save_pretrained(folder)
        with pytest.raises(UserError, match=message):
            load_reading(folder)
