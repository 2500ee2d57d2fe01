"""Named random streams."""

import hashlib

from pipeline.streams import short_stream, stream


def test_streams_of_other_names_and_seeds_differ():
    seeds = {stream(seed, name) for seed in (1, 2) for name in ("rollout", "validation")}
    assert len(seeds) == 4


def test_a_stream_is_the_beginning_of_a_digest_whatever_the_machine():
    digest = hashlib.sha256(b"3/dropout").hexdigest()
    assert stream(3, "dropout") == int(digest[:16], 16)
    assert short_stream(3, "dropout") == int(digest[8:16], 16)
