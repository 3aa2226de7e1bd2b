"""The fast path against the float64 oracle, over settings of both policies."""

from dataclasses import replace

import numpy as np
import pytest
from reference_cases import PAPER, SKETCH, check, tensors

from hga_jax.config import Llama3Scaling, RopeConfig, YarnScaling


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_size": 8, "group_size": 8, "summary": "mean"},
        {"chunk_size": 12, "group_size": 3, "sink_chunks": 0},
        {"chunk_size": 32, "group_size": 2, "top_groups": 20},
        {"sink_chunks": 0, "local_chunks": 0},
        {"sink_chunks": 4, "local_chunks": 0, "top_chunks": 1, "top_groups": 2},
        {"top_chunks": 30, "top_groups": 200},
    ],
    ids=str,
)
def test_settings(changes):
    check(*tensors(200), replace(PAPER, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_size": 8, "group_size": 8},
        {"chunk_size": 12, "group_size": 3},
        {"sink_chunks": 0, "local_chunks": 0},
        {"sink_chunks": 4, "local_chunks": 0, "threshold": 0.3},
        {"votes": 3, "vote_share": 0.3, "threshold": 0.05},
        {"votes": 3, "vote_share": 0.3, "threshold": 0.05, "vote_stride": 1},
        {"votes": 4, "vote_share": 0.2, "local_chunks": 0, "threshold": 0.1, "vote_stride": 2},
        {"votes": 2, "vote_share": 0.3, "threshold": 0.05, "page_capacity": 7},
        {"sketch_pairs": 3, "sink_chunks": 2, "votes": 3, "vote_share": 0.3, "threshold": 0.05},
    ],
    ids=str,
)
def test_sketch_settings(changes):
    _, expected = check(*tensors(200), replace(SKETCH, **changes))
    assert 0 < expected.opened.mean() < 0.9


def test_votes_keep_pages_that_nobody_asked_for():
    """Some pages are open to a chunk though no query of it or of the one before asked for them, and others close that would have stayed."""
    _, expected = check(*tensors(200), replace(SKETCH, votes=8, vote_share=0.1, vote_stride=1, threshold=0.1))
    _, usual = check(*tensors(200), replace(SKETCH, threshold=0.1))
    asked = expected.requested[:, 0].reshape(-1, 8, expected.requested.shape[-1])  # 25 half chunks of 8 queries
    lately = np.maximum.accumulate(asked, axis=1).any(1)
    lately = np.stack([lately[max(i - i % 2 - 2, 0) : i + 1].any(0) for i in range(25)])
    opened = expected.opened[:, 0].reshape(25, 8, -1).any(1)
    assert (opened & ~lately).any()
    assert (usual.opened & ~expected.opened).any()


def test_sketch_of_a_head_dim_that_does_not_fill_bytes():
    check(*tensors(100, head_dim=50), SKETCH)


def test_sketch_estimates_the_unopened_mass():
    """Against the definition, from exact float64 scores of what the sketches remember: with every page open nothing is left."""
    q, k, v = tensors(150)
    totals, expected = check(q, k, v, replace(SKETCH, threshold=1e-7))
    assert expected.opened.sum() == expected.requested.sum() * 2  # each page for both heads of its kv head, and all the time
    assert totals.unopened[0] == pytest.approx(0, abs=1e-4)
    totals, _ = check(q, k, v, replace(SKETCH, threshold=0.999))  # nothing is open
    assert 10 < totals.unopened[0] < 86  # of the 86 queries that have a routed middle


@pytest.mark.parametrize("capacity", [1, 5])
def test_sketch_refuses_in_query_order(capacity):
    """The oracle serves requests one by one; a later request never displaces an earlier one."""
    totals, expected = check(*tensors(200), replace(SKETCH, page_capacity=capacity))
    assert expected.refused > 0
    assert totals.refused[0] > 0
    assert (expected.opened.sum(-1) <= capacity).all()


@pytest.mark.parametrize(
    "rope", [RopeConfig(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 64)), RopeConfig(10000.0, YarnScaling(4.0, 64))], ids=["llama3", "yarn"]
)
def test_scaled_rope(rope):
    check(*tensors(150, head_dim=32, rope=rope), PAPER, rope=rope)


def test_score_scale():
    check(*tensors(150), PAPER, scale=0.6)
