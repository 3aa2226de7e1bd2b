"""Losses equal those of transformers' logits, gaps come with the right standard error, and missed mass equals a float64 count."""

import itertools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from eval_checkpoint import GOLDEN, readable_checkpoint

from hga_jax.backend import DenseAttention
from hga_jax.config import HGAConfig
from hga_jax.eval import mass, nll
from hga_jax.eval.choices import DENSE, Choice, parse_choices, with_dense
from hga_jax.eval.losses import paired_gap, position_bins, score
from hga_jax.eval.sweep import pareto, sweep_words
from hga_jax.loading import load_model
from hga_jax.reference import reference_attention
from hga_jax.sketches import built_in_rotation

SMALL = HGAConfig(policy="paper", chunk_size=16, group_size=4, sink_chunks=1, local_chunks=1, top_chunks=2, top_groups=4)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "qwen3_moe"])
def test_losses_are_those_of_transformers(family):
    golden = np.load(GOLDEN / f"{family}.npz")
    tokens = golden["tokens"]
    model = load_model(GOLDEN / family, dtype=jnp.float32)
    scored = score(model, tokens, DenseAttention())
    logits = golden["logits"].astype(np.float64)
    expected = np.log(np.exp(logits).sum(-1))[:-1] - logits[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(scored.nats, expected, atol=2e-4, rtol=0)  # logits agree to 1e-4
    assert float(scored.stats.queries) == len(tokens) * model.config.layers


def test_paired_gap_of_independent_differences():
    draw = np.random.default_rng(0)
    differences = draw.normal(0.01, 0.5, 64 * 400)
    gap, error = paired_gap([differences])
    assert gap == pytest.approx(differences.mean())
    assert error == pytest.approx(0.5 / np.sqrt(len(differences)), rel=0.1)


def test_paired_gap_sees_correlation_within_blocks():
    draw = np.random.default_rng(0)
    blocks = draw.normal(0, 1, 100)
    gap, error = paired_gap([np.repeat(blocks, 64)])
    assert gap == pytest.approx(blocks.mean())
    assert error == pytest.approx(blocks.std(ddof=1) / 10)


def test_paired_gap_with_odd_lengths():
    parts = [np.arange(200.0), np.arange(70.0), np.arange(3.0)]
    assert paired_gap(parts)[0] == pytest.approx(np.concatenate(parts).mean())
    assert paired_gap([np.ones(100)]) == (1.0, None)


def test_position_bins_cover_what_is_scored():
    bins = position_bins(1024, 8192, 8)
    assert bins[0][0] == 1025
    assert bins[-1][1] == 8192
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bins))
    assert position_bins(0, 4, 8) == [(1, 2), (2, 3), (3, 4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(readable_checkpoint(tmp_path_factory.mktemp("model")), dtype=jnp.float32)


TEXTS = {"a.txt": "The quick brown fox jumps over the lazy dog. " * 12, "b.txt": "Sphinx of black quartz, judge my vow! " * 12}


@pytest.fixture(scope="module")
def report(model):
    choices = [DENSE, Choice("paper", SMALL), Choice("wide", HGAConfig(policy="paper"))]
    return nll.evaluate(model, TEXTS, 300, choices, skip=100)


def test_report_has_the_documented_keys(report):
    documented = "model length tokens_scored dense_nats hga_nats gap_nats attended_fraction fetched_fraction policies documents"
    assert set(documented.split()) <= report.keys()
    assert report["tokens_scored"] == 2 * 199
    assert report["hga_nats"] - report["dense_nats"] == pytest.approx(report["gap_nats"], abs=1e-6)


def test_windows_that_hold_everything_lose_nothing(report):
    wide = report["policies"][2]
    assert wide["attended_fraction"] == 1
    assert abs(wide["gap_nats"]) < 1e-5  # float32, another order of sums


def test_a_narrow_policy_loses_something(report):
    paper = report["policies"][1]
    assert 0.1 < paper["attended_fraction"] < 0.6
    assert abs(paper["gap_nats"]) > 1e-3
    assert paper["gap_standard_error"] > 0


def test_documents_and_positions_add_up(report):
    for i, policy in enumerate(report["policies"]):
        each = [text["policies"][i]["nats"] for text in report["documents"]]
        assert np.mean(each) == pytest.approx(policy["nats"], abs=1e-6)
        sizes = [part["end"] - part["first"] for part in policy["by_position"]]
        assert np.average([part["nats"] for part in policy["by_position"]], weights=sizes) == pytest.approx(policy["nats"], abs=1e-6)
    assert "a.txt: paper" in nll.as_text(report)


def test_short_text_is_refused(model):
    with pytest.raises(ValueError, match=r"b\.txt has 9 tokens, fewer than --length 300"):
        nll.documents(model, {"b.txt": "too short"}, 300)


SKETCH = replace(SMALL, policy="sketch", threshold=0.05)


@pytest.mark.parametrize(("config", "skip"), [(SMALL, 0), (SMALL, 100), (SKETCH, 0)], ids=["paper", "paper from 100", "sketch"])
def test_missed_mass_equals_a_float64_count(model, config, skip):
    """Which pages are open comes from the numpy oracle, the softmax from float64."""
    tokens = model.tokenizer.encode(TEXTS["a.txt"])[:150]
    backend = model.backend("hga", config)
    layer = model.params.layers[0]
    x = model.params.embed(jnp.asarray(tokens))
    query, key, value = (np.asarray(a, np.float64) for a in layer.attention.project(x, layer.attention_norm, jnp.arange(150)))
    rotation = built_in_rotation(query.shape[-1])
    opened = reference_attention(query, key, value, config=config, rope=model.config.rope, rotation=rotation).opened
    heads, kv_heads = query.shape[1], key.shape[1]
    missed, middle = np.zeros(heads), np.zeros(heads)
    for t in range(skip + 1, 150):
        own = t // SMALL.chunk_size
        pages = np.arange(t + 1) // SMALL.group_size
        routed = (np.arange(t + 1) >= 16) & (np.arange(t + 1) < (own - 1) * 16)
        for n in range(heads):
            scores = key[: t + 1, n * kv_heads // heads] @ query[t, n] / np.sqrt(query.shape[-1])
            share = np.exp(scores - scores.max())
            share /= share.sum()
            middle[n] += share[routed].sum()
            seen = np.array([page < opened.shape[2] and opened[t, n, page] for page in pages])
            missed[n] += share[routed & ~seen].sum()
    found = mass.layer_mass(layer, x, jnp.int32(150), jnp.int32(skip), backend=backend)
    np.testing.assert_allclose(found[0], missed / (149 - skip), atol=1e-5, rtol=0)
    np.testing.assert_allclose(found[1], middle / (149 - skip), atol=1e-5, rtol=0)
    assert 1 < missed.max() < middle.max()  # the test would pass on zeros otherwise


def test_mass_of_all_layers(model):
    report = mass.evaluate(model, TEXTS, 300, [Choice("paper", SMALL), Choice("wide", HGAConfig(policy="paper"))], skip=100)
    narrow, wide = (np.array(policy["missed"]) for policy in report["policies"])
    assert narrow.shape == (model.config.layers, model.config.heads)
    assert 0.01 < narrow.mean() < 1
    assert not wide.any()


def test_windows_alone_miss_all_of_the_middle(model):
    (windows,) = parse_choices(["windows:chunk_size=16,group_size=4,sink_chunks=1,local_chunks=1"])
    (policy,) = mass.evaluate(model, TEXTS, 300, [windows], skip=100)["policies"]
    np.testing.assert_allclose(policy["missed"], policy["middle"], rtol=1e-6)
    assert policy["missed_mean"] > 0.1


def test_policy_words():
    dense, paper, windows = parse_choices(["dense", "paper:top_chunks=20,summary=mean", "windows"], {"sink_chunks": 6, "top_chunks": 3})
    assert dense.hga is None
    assert paper.hga == HGAConfig(policy="paper", top_chunks=20, summary="mean", sink_chunks=6)
    assert windows.hga.sink_chunks == 6
    assert with_dense([paper]) == [DENSE, paper]
    assert sweep_words(["0.004"], ["16/64"]) == ["sketch:threshold=0.004", "paper:top_chunks=16,top_groups=64"]


def test_pareto_front():
    points = [{"gap_nats": gap, "fetched_tokens": fetched} for gap, fetched in [(0.3, 100), (0.1, 200), (0.2, 250), (0.05, 300)]]
    assert pareto(points) == [True, True, False, True]
