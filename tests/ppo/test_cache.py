"""The cache with room holds what the library's own holds, and copies nothing to do so."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

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


def test_layers_of_another_kind_stay():
    sliding, unread = DynamicSlidingWindowLayer(sliding_window=3), DynamicLayer()
    sliding.update(states(positions=5, seed=0), states(positions=5, seed=1))
    cache = DynamicCache()
    cache.layers = [sliding, unread]
    make_room(cache, positions=4)
    assert cache.layers == [sliding, unread]
    make_room(object(), positions=4)  # a recurrent model's state has no layers
