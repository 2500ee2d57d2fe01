"""The cache with room holds what the library's own holds, and copies nothing to do so."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from pipeline.attention import PACKED, PRECISIONS, kept_in
from pipeline.ppo.cache import RoomyLayer, make_room


def states(*, positions, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, positions, 4, generator=generator)


def caches():
    """Two caches that have read the same five positions, the second with room for four more."""
    both = [DynamicCache(), DynamicCache()]
    for cache in both:
        cache.update(states(positions=5, seed=0), states(positions=5, seed=1), 0)
    make_room(both[1], positions=4)
    return both


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_holds_what_the_growing_cache_holds():
    plain, roomy = caches()
    assert isinstance(roomy.layers[0], RoomyLayer)
    for step in range(4):
        new = [states(positions=1, seed=seed)[: len(plain.layers[0].keys)] for seed in (step, 9)]
        assert same(roomy.update(*new, 0), plain.update(*new, 0))
        assert roomy.get_seq_length() == plain.get_seq_length() == 6 + step
        if step == 1:
            for cache in (plain, roomy):
                cache.batch_select_indices(torch.tensor([2, 0]))
            assert same(*([c.layers[0].keys, c.layers[0].values] for c in (roomy, plain)))


def test_a_step_copies_nothing_that_was_there():
    _, roomy = caches()
    before = [part.data_ptr() for part in (roomy.layers[0].keys, roomy.layers[0].values)]
    after = roomy.update(states(positions=1, seed=2), states(positions=1, seed=3), 0)
    assert [part.data_ptr() for part in after] == before


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("precision", [*PRECISIONS, None])
def test_what_keys_and_values_are_kept_in(given, precision):
    name = PACKED[precision] if precision else "sdpa"
    with torch.autocast("cpu", torch.bfloat16):
        cache = DynamicCache()
        cache.update(*[states(positions=5, seed=seed).to(given) for seed in (0, 1)], 0)
        make_room(cache, positions=2, attention=name)
        new = states(positions=1, seed=2).to(given)
        keys, values = cache.update(new, new, 0)
    wide = torch.promote_types(given, torch.float32)
    wanted = {None: given, "fp32": wide}.get(precision, torch.bfloat16)
    assert keys.dtype == values.dtype == wanted
    assert torch.equal(keys[:, :, 5:], new.to(wanted))
    assert torch.equal(keys[:, :, :5], states(positions=5, seed=0).to(given).to(wanted))
    assert kept_in(PACKED["bf16"], new) == given  # without autocast nothing is narrowed


def test_layers_of_another_kind_stay():
    sliding, unread = DynamicSlidingWindowLayer(sliding_window=3), DynamicLayer()
    sliding.update(states(positions=5, seed=0), states(positions=5, seed=1))
    cache = DynamicCache()
    cache.layers = [sliding, unread]
    make_room(cache, positions=4)
    assert cache.layers == [sliding, unread]
    make_room(object(), positions=4)  # a recurrent model's state has no layers
