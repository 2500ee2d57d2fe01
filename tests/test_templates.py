"""Chat templates that a model is given, on tokenizers as Pythia and Llama 3.1 have them."""

from pathlib import Path

import pytest
import trl
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.borrowed import borrow_tokenizer
from pipeline.errors import UserError
from pipeline.instructions import encode_rows
from pipeline.templates import BUILT_IN, read_template
from pipeline.tokenizer import (
    decode_response,
    encode_conversation,
    encode_prompt,
    encode_response,
)
from stages.tokenizer import Config, _check_template

POST = "SUBREDDIT: r/dogs\n\nTITLE: My dog\n\nPOST: It barks. All day long.\n\nTL;DR:"
SUMMARY = "dog barks"
USER, ASSISTANT = {"role": "user", "content": POST}, {"role": "assistant", "content": SUMMARY}
LLAMA_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
LLAMA_OWN = Path(trl.__file__).parent / "chat_templates" / "llama3_1.jinja"


def bytes_bpe(special, *, bos=None, **names):
    """A byte-level BPE tokenizer without a space before the first word, as both families have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([POST, " dog barks", SUMMARY] * 9, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, **names)


@pytest.fixture(scope="module")
def pythia(tmp_path_factory):
    """A folder as GPT-NeoX's tokenizer has it: one token for BOS, EOS, UNK, no PAD, no template."""
    path = tmp_path_factory.mktemp("pythia")
    end = "<|endoftext|>"
    made = bytes_bpe([end, "<|padding|>"], eos_token=end, unk_token=end)
    made.bos_token = end
    made.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder as Llama 3.1's tokenizer has it: BOS in front, its own template, no PAD."""
    path = tmp_path_factory.mktemp("llama")
    made = bytes_bpe(LLAMA_TOKENS, bos=LLAMA_TOKENS[0], eos_token="<|eot_id|>")
    made.chat_template = LLAMA_OWN.read_text()
    made.save_pretrained(path)
    return str(path)


def given(folder, name):
    """The tokenizer after it was given a template, saved and loaded as a stage loads it."""
    borrowed = borrow_tokenizer(folder, given=read_template(name, recipe="none"))
    _check_template(borrowed.tokenizer, setting="chat_template")
    borrowed.tokenizer.save_pretrained(folder + "-given")
    return AutoTokenizer.from_pretrained(folder + "-given"), borrowed.mended


def tokens(tokenizer, *texts):
    return [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_a_base_model_goes_on_with_the_prompt_after_a_space(pythia):
    tokenizer, mended = given(pythia, "plain")
    assert mended == ("the chat template is plain", "PAD is <|padding|>; it was missing")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert encode_prompt(tokenizer, POST) == tokens(tokenizer, POST)
    reply = [*tokens(tokenizer, " dog barks"), 0]
    assert reply != [*tokens(tokenizer, SUMMARY), 0]
    assert encode_response(tokenizer, f"\n{SUMMARY} ") == reply
    assert decode_response(tokenizer, reply) == SUMMARY
    ids, is_response = encode_conversation(tokenizer, [USER, ASSISTANT])
    assert ids == encode_prompt(tokenizer, POST) + reply
    assert ids == [*tokens(tokenizer, f"{POST} {SUMMARY}"), 0]
    assert [i for i, marked in zip(ids, is_response, strict=True) if marked] == reply


def test_sft_learns_the_reply_with_the_space_that_ppo_will_write(pythia):
    tokenizer, _ = given(pythia, "plain")
    pair, conversation = encode_rows(
        tokenizer, [{"prompt": POST, "completion": SUMMARY}, {"messages": [USER, ASSISTANT]}]
    )
    assert pair == conversation
    assert [i for i in pair.labels if i >= 0] == encode_response(tokenizer, SUMMARY)


def test_plain_parts_the_turns_by_eos_alone(pythia):
    tokenizer, _ = given(pythia, "plain")
    system = {"role": "system", "content": " Be brief. "}
    text = tokenizer.apply_chat_template([system, USER, ASSISTANT, USER], tokenize=False)
    assert text == f"Be brief.\n\n{POST} dog barks<|endoftext|>{POST}"


def test_a_llama_gets_its_format_marked_and_its_own_pad(llama):
    with pytest.raises(UserError, match="does not mark .* or set chat_template to another"):
        borrow_tokenizer(llama)
    tokenizer, mended = given(llama, "llama3")
    assert mended == (
        "the chat template is llama3",
        "PAD is <|finetune_right_pad_id|>; it was missing",
    )
    ids, is_response = encode_conversation(tokenizer, [USER, ASSISTANT])
    start, end, eot = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
    before = f"<|begin_of_text|>{start}user{end}{POST}{eot}{start}assistant{end}"
    assert ids == tokens(tokenizer, before, SUMMARY, eot)
    assert encode_prompt(tokenizer, POST) == tokens(tokenizer, before)
    marked = [i for i, is_marked in zip(ids, is_response, strict=True) if is_marked]
    assert marked == encode_response(tokenizer, SUMMARY) == tokens(tokenizer, SUMMARY, eot)


def test_the_models_own_template_differs_by_its_system_message_alone(llama):
    own = AutoTokenizer.from_pretrained(llama).apply_chat_template([USER], tokenize=False)
    tokenizer, _ = given(llama, "llama3")
    ours = tokenizer.apply_chat_template([USER], tokenize=False)
    start, _, _ = own.partition("<|start_header_id|>user")
    assert start.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n")
    assert ours == "<|begin_of_text|>" + own.removeprefix(start)


def test_chatml_brings_the_tokens_that_the_model_lacks(pythia):
    tokenizer, mended = given(pythia, "chatml")
    assert mended[1:3] == (
        "<|im_start|>, <|im_end|> are new tokens",
        "EOS is <|im_end|>; it was <|endoftext|>",
    )
    own = AutoTokenizer.from_pretrained(pythia)
    assert (tokenizer.eos_token, len(tokenizer)) == ("<|im_end|>", len(own) + 2)
    assert encode_response(tokenizer, SUMMARY) == [*tokens(own, SUMMARY), len(own) + 1]
    ids, is_response = encode_conversation(tokenizer, [USER, ASSISTANT])
    marked = [i for i, is_marked in zip(ids, is_response, strict=True) if is_marked]
    assert marked == encode_response(tokenizer, SUMMARY)


def test_a_file_is_looked_for_beside_the_yaml_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, text in (("configs/mine", "beside"), (".", "here")):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "own.jinja").write_text(text)
    assert read_template("own.jinja", recipe="mine").text == "beside"
    assert read_template("own.jinja", recipe="other").text == "here"
    config = Config(recipe="mine", init_from="x/y", chat_template="own.jinja")
    assert config.outside("tokenizer") == {
        "tokenizer/chat_template": Path("configs/mine/own.jinja")
    }
    Path("own.jinja").write_text(" \n")
    with pytest.raises(UserError, match="chat_template: own.jinja is empty"):
        read_template("own.jinja", recipe="other")
    with pytest.raises(UserError, match="neither none.jinja nor one beside configs/mine/"):
        read_template("none.jinja", recipe="mine")


MARKED = BUILT_IN["plain"].text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages[0]['content'] }}", "chat_template: own.jinja does not mark"),
        ("{{ raise_exception('no') }}", "chat_template: own.jinja does not mark"),
        (MARKED.replace("+ eos_token", ""), "chat_template: .* does not end a reply with the EOS"),
        (MARKED.replace("' ' +", "'Summary: ' +"), "not the tokens of its prompt followed by"),
        (MARKED + "{% if add_generation_prompt %}:{% endif %}", "not the tokens of its prompt"),
    ],
)
def test_a_template_that_the_stages_cannot_rely_on_is_refused(
    pythia, tmp_path, monkeypatch, text, message
):
    monkeypatch.chdir(tmp_path)
    Path("own.jinja").write_text(text)
    with pytest.raises(UserError, match=message):
        given(pythia, "own.jinja")
