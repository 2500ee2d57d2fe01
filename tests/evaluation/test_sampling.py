"""Replies of a policy: the same numbers for every policy, however the work is cut."""

import json

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.sampling import (
    Sampling,
    load_any,
    pad_id_of,
    reply_to_all,
    sample,
)
from tests.evaluation.fakes import save_language_model, tiny_tokenizer

SAMPLING = Sampling(seed=3, max_response_tokens=6, batch_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_any(str(folder))


def replies(loaded, prompts, rows, *, draw=0):
    model, tokenizer = loaded
    return sample(
        model, tokenizer=tokenizer, prompts=prompts, rows=rows, draw=draw, sampling=SAMPLING
    )


def test_a_reply_depends_on_its_row_and_not_on_its_neighbours(loaded):
    prompts = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]]
    whole = replies(loaded, prompts, [0, 1, 2, 3])
    assert whole[1::2] == replies(loaded, prompts[1::2], [1, 3])
    assert whole != replies(loaded, prompts, [0, 1, 2, 3], draw=1)


def test_a_reply_ends_with_eos_or_at_the_limit(loaded):
    eos = loaded[1].eos_token_id
    for reply in replies(loaded, [[5, 6, 7]] * 40, list(range(40))):
        assert reply.ended == (reply.tokens[-1] == eos)
        assert reply.ended or len(reply.tokens) == 6
        assert eos not in reply.tokens[:-1]


def test_bulk_replies_are_the_rows_of_any_batch_size(loaded):
    model, tokenizer = loaded
    prompts = ["love you", [{"role": "user", "content": "music"}], "what a great day"]
    whole = reply_to_all(
        model, tokenizer=tokenizer, prompts=prompts, rows=[0, 1, 2], sampling=SAMPLING
    )
    last = reply_to_all(
        model, tokenizer=tokenizer, prompts=prompts[2:], rows=[2], sampling=SAMPLING
    )
    assert whole[2:] == last


def test_a_model_without_a_template_continues_text_and_refuses_conversations(tmp_path):
    model, tokenizer = load_any(str(save_language_model(tmp_path, template=False)))
    words = {"tokenizer": tokenizer, "rows": [0], "sampling": SAMPLING}
    assert len(reply_to_all(model, prompts=["love you"], **words)) == 1
    conversation = [{"role": "user", "content": "music"}]
    with pytest.raises(UserError, match="needs a model whose tokenizer has a template"):
        reply_to_all(model, prompts=[conversation], **words)


def test_a_prompt_beyond_the_context_is_named(loaded):
    model, tokenizer = loaded
    words = {"tokenizer": tokenizer, "rows": [0, 1], "sampling": SAMPLING}
    with pytest.raises(UserError, match=r"generate\.prompts, prompt 2: \d+ tokens and a reply"):
        reply_to_all(model, prompts=["love", "x " * 80], **words)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder of a causal language model"):
        load_any(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="no tokenizer could be loaded from there"):
        load_any(str(tmp_path))


def test_a_tokenizer_without_eos_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no EOS token"):
        load_any(str(tmp_path))


def test_eos_fills_up_where_there_is_no_pad(loaded):
    assert pad_id_of(loaded[1]) == loaded[1].pad_token_id != loaded[1].eos_token_id
    foreign = tiny_tokenizer()
    foreign.pad_token = None
    assert pad_id_of(foreign) == foreign.eos_token_id
