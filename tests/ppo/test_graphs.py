"""Steps of one shape draw the same tokens; on a GPU as CUDA graphs (tests/gpu)."""

import itertools
import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.attention import pack
from pipeline.ppo import graphs, rollout
from pipeline.ppo.graphs import StaticSteps, can_keep_one_shape
from pipeline.ppo.passes import precision_context
from pipeline.ppo.rollout import generate, uniforms
from tests.support import assert_close, tiny_llama

EOS, PAD, BUDGET, ROWS = 1, 0, 12, 30
SIZES = {
    "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
FAMILIES = {
    "llama": {"num_key_value_heads": 1, "intermediate_size": 32},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 32},
    "qwen3": {"num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 8},
}


@pytest.fixture(scope="module")
def prompts():
    generator = random.Random(0)
    lengths = [generator.randint(1, 9) for _ in range(ROWS)]
    return [[generator.randrange(2, 24) for _ in range(length)] for length in lengths]


def sampled(model, prompts, *, static):
    numbers = uniforms(7, update=3, rows=range(len(prompts)), positions=BUDGET)
    with mock.patch.object(rollout, "prefers_one_shape", return_value=static):
        return generate(model, prompts, uniforms=numbers, eos_id=EOS, pad_id=PAD)


def made(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    return model


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of every call of a static step."""
    seen = []
    forward = StaticSteps._forward

    def noted(self):
        seen.append((tuple(self.ids.shape), tuple(self.visible.shape)))
        return forward(self)

    monkeypatch.setattr(StaticSteps, "_forward", noted)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_as_growing_steps(family, prompts, shapes):
    model = made(family)
    ours, theirs = (sampled(model, prompts, static=static) for static in (True, False))
    assert ours.responses == theirs.responses
    for name in ("logprobs", "entropy"):
        for one, other in zip(ours.figures[name], theirs.figures[name], strict=True):
            assert_close(one, other, tolerance=1e-9)
    assert {len(response) for response in ours.responses} & set(range(1, BUDGET))
    assert shapes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_the_precisions_of_training(prompts, shapes, precision):
    model = tiny_llama()
    with precision_context(precision, model.device):
        ours, theirs = (sampled(model, prompts, static=static) for static in (True, False))
    assert ours.responses == theirs.responses
    assert shapes


def test_shapes_change_only_when_enough_rows_have_ended(prompts, shapes, monkeypatch):
    model = tiny_llama().double()
    plain = sampled(model, prompts, static=False).responses
    monkeypatch.setattr(rollout, "RECAPTURE_AT", 0.85)
    assert sampled(model, prompts, static=True).responses == plain
    rows = [ids[0] for ids, _ in shapes]
    assert rows[0] == ROWS
    assert len(set(shapes)) == len(set(rows)) > 1
    assert all(b == a or b <= 0.85 * a for a, b in itertools.pairwise(rows))


def test_a_packed_model_may_keep_one_shape(prompts, shapes):
    model = tiny_llama().double()
    plain = sampled(model, prompts, static=False).responses
    assert pack(model)
    assert sampled(model, prompts, static=True).responses == plain
    assert shapes


def test_what_cannot_keep_one_shape_grows(prompts, shapes):
    config = AutoConfig.for_model("mistral", **SIZES, intermediate_size=32, sliding_window=4,
                                  num_key_value_heads=1)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().double()
    ours, theirs = (sampled(model, prompts, static=static).responses for static in (True, False))
    assert ours == theirs
    assert not shapes
    eager = tiny_llama()
    eager.set_attn_implementation("eager")
    cache = eager(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values
    assert not can_keep_one_shape(eager, cache)
    assert not can_keep_one_shape(tiny_llama(), object())


def steps(model, *, room=4):
    """Steps behind two prompts, the first of which has one token less."""
    ids, mask = torch.tensor([[PAD, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    cache = model(**inputs, use_cache=True).past_key_values
    return StaticSteps(model, cache, mask=mask, positions=positions[:, -1:], room=room)


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph: replays what `torch.cuda.graph` was shown."""

    def replay(self):
        self.taken.logits.copy_(self.taken._forward())


@pytest.fixture
def fake_cuda(monkeypatch):
    """Streams and graphs that do nothing but be there; counts the captures."""
    captured = []

    class Capture:
        def __init__(self, graph):
            captured.append(graph)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(graphs, "_casting_anew", torch.no_grad)
    return captured


@torch.no_grad()
def test_a_capture_leaves_everything_as_it_was(fake_cuda):
    model = tiny_llama().double()
    plain, captured = steps(model), steps(model)
    before = [captured.visible.clone(), captured.positions.clone(), captured.place.clone()]
    captured._capture()
    assert len(fake_cuda) == 1
    # A real capture runs nothing; this one has run a step, which is taken back here.
    graphs._put_back([captured.visible, captured.positions, captured.place], before)
    for layer in captured.cache.layers:
        layer.cumulative_length.sub_(1)
    captured.graph.taken = captured
    for tokens in ([4, 5], [6, 7], [8, 9]):
        ids = torch.tensor(tokens)[:, None]
        assert_close(captured.step(ids), plain.step(ids), tolerance=1e-9)


@torch.no_grad()
def test_a_graph_reads_no_casts_of_the_steps_before_it(fake_cuda, monkeypatch):
    """Accelerate has a trained model cast in each call, with a cache that a capture outlives."""
    model, casts = tiny_llama(), []
    static = steps(model)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    forward = StaticSteps._forward

    def noted(self):
        with torch.profiler.profile() as profile:
            logits = forward(self)
        copied = {each.key: each.count for each in profile.key_averages()}
        casts.append(copied["aten::_to_copy"])
        return logits

    monkeypatch.setattr(StaticSteps, "_forward", noted)
    monkeypatch.setattr(
        graphs, "_casting_anew", lambda: torch.autocast("cpu", enabled=False, cache_enabled=False)
    )
    static._capture()
    first, second, captured = casts
    assert fake_cuda
    assert first == captured > second


@torch.no_grad()
def test_where_nothing_can_be_captured_steps_are_run(fake_cuda, monkeypatch, caplog):
    def refused(_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = tiny_llama().double()
    plain, ours = steps(model), steps(model)
    ours.captures = True
    monkeypatch.setattr(torch.cuda, "graph", refused)
    with caplog.at_level("INFO"):
        for tokens in ([4, 5], [6, 7]):
            ids = torch.tensor(tokens)[:, None]
            assert_close(ours.step(ids), plain.step(ids), tolerance=1e-9)
    said = "operation not permitted when stream is capturing"
    assert [record.getMessage() for record in caplog.records] == [
        f"decoding: no CUDA graph, steps are run one by one: {said}"
    ]


@torch.no_grad()
def test_a_capture_that_ends_badly_leaves_the_stream_that_was_on(fake_cuda, monkeypatch):
    on = [torch.cuda.current_stream()]

    class Chosen:  # as torch.cuda.stream
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            self.before, on[0] = on[0], self.stream

        def __exit__(self, *_):
            on[0] = self.before

    class Broken(Chosen):  # as torch.cuda.graph, which raises before it puts its own stream back
        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "stream", Chosen)
    model = tiny_llama().double()
    plain, ours = steps(model), steps(model)
    ours.captures = True
    monkeypatch.setattr(torch.cuda, "graph", Broken)
    ids = torch.tensor([[4], [5]])
    assert_close(ours.step(ids), plain.step(ids), tolerance=1e-9)
    assert on == [torch.cuda.current_stream()]


@torch.no_grad()
def test_rows_that_are_kept_go_on_and_are_captured_anew(fake_cuda):
    model = tiny_llama().double()
    plain, ours = steps(model), steps(model)
    for each in (plain, ours):
        each.step(torch.tensor([[4], [5]]))
    ours.graph = FakeGraph()
    ours.select(torch.tensor([1]))
    assert ours.graph is None
    expected = plain.step(torch.tensor([[6], [7]]))[1:]
    assert_close(ours.step(torch.tensor([[7]])), expected, tolerance=1e-9)
