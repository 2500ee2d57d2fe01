"""Attention under autocast: what is measured, what is chosen, and that the choice is obeyed."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MambaConfig

from pipeline.attention import PRECISIONS, pack
from pipeline.ppo import cache, fast_attention
from pipeline.ppo.fast_attention import fastest_attention
from pipeline.ppo.passes import precision_context
from pipeline.ppo.rollout import generate, uniforms
from tests.support import tiny_llama

SIZES = {"prompt": 6, "response": 8, "passes": 2, "threads": 1}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]
LLAMA = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("config", [LLAMA, GPT2Config(n_embd=32, n_head=2)])
def test_every_way_is_run_and_one_is_chosen(config, monkeypatch):
    ran, attend = [], fast_attention.packed_attention

    def noted(layer, query, *parts, precision, row_lengths=None):
        ran.append((precision, parts[0].dtype, row_lengths is None))
        return attend(layer, query, *parts, precision=precision, row_lengths=row_lengths)

    monkeypatch.setattr(fast_attention, "packed_attention", noted)
    threads = torch.get_num_threads()
    assert fastest_attention(config, **SIZES) in PRECISIONS
    assert torch.get_num_threads() == threads
    narrow, wide = torch.bfloat16, torch.float32
    reads = {("fp32", wide, False), ("bf16", wide, False)}
    decodes = {("fp32", wide, True), ("mixed", narrow, True), ("bf16", narrow, True)}
    assert set(ran) == reads | decodes


@pytest.mark.parametrize(
    ("read", "decoded", "chosen"),
    [
        ({"fp32": 1.0, "bf16": 4.0}, {"fp32": 1.0, "mixed": 2.0, "bf16": 3.0}, "fp32"),
        ({"fp32": 0.1, "bf16": 0.4}, {"fp32": 4.0, "mixed": 2.0, "bf16": 3.0}, "mixed"),
        ({"fp32": 2.0, "bf16": 1.0}, {"fp32": 1.0, "mixed": 1.0, "bf16": 1.5}, "bf16"),
        ({"fp32": 1.0, "bf16": 0.95}, {"fp32": 1.0, "mixed": 0.95, "bf16": 0.95}, "fp32"),
    ],
)
def test_the_clearly_fastest_for_an_update_is_chosen(read, decoded, chosen, monkeypatch):
    answers = iter([dict(read), decoded])
    monkeypatch.setattr(fast_attention, "_seconds", lambda *_: next(answers))
    assert fastest_attention(LLAMA, **{**SIZES, "response": fast_attention.STEPS}) == chosen


def test_a_model_without_heads_has_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(fast_attention, "_Layers", lambda _: pytest.fail("measured"))
    assert fastest_attention(MambaConfig(hidden_size=16), **SIZES) == "fp32"


def test_seconds_are_the_best_of_the_turns_after_the_first(monkeypatch):
    clock = iter(map(float, [0, 9, 0, 9, 0, 3, 0, 5, 0, 2, 0, 7, 0, 4, 0, 6]))
    ticking = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(fast_attention, "time", ticking)
    seen = []
    assert fast_attention._seconds(seen.append, ("a", "b")) == {"a": 2, "b": 5}
    assert seen == ["a", "b"] * (fast_attention.TURNS + 1)


def test_a_narrow_cache_and_a_wide_one(monkeypatch):
    kept, fill = set(), cache.RoomyLayer._fill

    def filled(self, length):
        kept.update(room.dtype for room in self.rooms)
        fill(self, length)

    monkeypatch.setattr(cache.RoomyLayer, "_fill", filled)
    numbers = uniforms(0, update=0, rows=range(len(PROMPTS)), positions=12)
    found = {}
    for precision in PRECISIONS:
        model = tiny_llama()
        assert pack(model, precision=precision)
        kept.clear()
        with precision_context("bf16", model.device):
            found[precision] = generate(model, PROMPTS, uniforms=numbers, eos_id=1, pad_id=0)
        assert kept == {torch.float32 if precision == "fp32" else torch.bfloat16}
    firsts = [[row[0] for row in sampled.responses] for sampled in found.values()]
    assert firsts[0] == firsts[1]  # before anything is kept
