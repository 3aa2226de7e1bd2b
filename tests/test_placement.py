"""Where weights go: the embedding table in host memory on a CUDA GPU, what the plan says of it, and loading through bounded buffers."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import assert_same_weights

from convert import load_decoder
from convert.synthetic import make_config, write_synthetic
from hga_jax import placement, plan, programs
from hga_jax.attention import HGAAttention
from hga_jax.backend import DenseAttention
from hga_jax.bench.load import measure
from hga_jax.config import HGAConfig, ModelConfig
from hga_jax.language_model import LanguageModel
from hga_jax.plan import RESERVE, layers_to_host, make_plan, place_history


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("load") / "model", "qwen3-30b-a3b-fp8", layers=2, tiny=True, max_shard_bytes=200_000)


@pytest.mark.parametrize(("like", "hosted"), [("qwen3-30b-a3b-fp8", True), ("qwen3-0.6b", False)])
def test_the_plan_puts_an_untied_embedding_on_the_host(like, hosted, monkeypatch):
    """Qwen3-30B-A3B-FP8: 28.45 GiB on the device (27.0 experts, 0.84 attention, 0.58 head), 0.58 beside; a tied table stays."""
    config = ModelConfig.from_hf(make_config(like))
    here = make_plan(config, DenseAttention(), 1024, jnp.bfloat16)
    monkeypatch.setattr(placement, "is_cuda", lambda device: True)
    there = make_plan(config, DenseAttention(), 1024, jnp.bfloat16)
    table = config.vocab_size * config.hidden_size * 2
    assert here.host_weights == 0
    assert there.host_weights == (table if hosted else 0)
    assert there.weights + there.host_weights == here.weights
    assert there.total == here.total - there.host_weights + there.reserve - here.reserve
    assert ("pinned host" in there.table()) == hosted
    if hosted:
        assert there.weights / 2**30 == pytest.approx(28.45, abs=0.01)


@pytest.fixture
def thirty_billion(monkeypatch):
    """Plans of Qwen3-30B-A3B-FP8 for a GPU with the memory of the one measured: an H100 held to 39 % of its own, 30.88 GiB."""
    monkeypatch.setattr(placement, "is_cuda", lambda device: True)
    monkeypatch.setattr(programs, "on_cuda", lambda: True)
    monkeypatch.setattr(plan, "_memory", lambda device: ("GPU memory", 33_158_070_272))
    monkeypatch.setattr(plan, "has_own_memory", lambda device: True)
    monkeypatch.setattr(plan, "_main_memory", lambda: ("main memory", 128 * 2**30))
    config = ModelConfig.from_hf(make_config("qwen3-30b-a3b-fp8"))

    def placed(ctx, policy="sketch", host_experts=0):
        backend = HGAAttention(HGAConfig(policy=policy), config.rope)
        return place_history(config, backend, ctx, jnp.bfloat16, "host", host_experts=host_experts)

    placed.layers_to_host = lambda ctx: layers_to_host(config, HGAAttention(HGAConfig(), config.rope), ctx, jnp.bfloat16, "host")
    return placed


def test_the_plan_is_what_the_allocator_said(thirty_billion):
    """Measured: the allocator's peak was 30,552,215,552 bytes after loading; with the history in host memory 32,410,853,888 after a prompt
    of 65,536 tokens and 512 more (30.88 GiB allowed, JAX 0.11.2), 33,066,887,936 after one of 261,632 tokens and 512 more."""
    plan = thirty_billion(65_536 + 512)[1]
    assert plan.weights == 30_552_215_552
    assert plan.segment == 16_384
    assert 32_410_853_888 <= plan.total <= 1.01 * 32_410_853_888
    assert plan.fits
    assert 33_066_887_936 <= thirty_billion(261_632 + 512)[1].total <= 1.003 * 33_066_887_936


def test_256k_tokens_fit_with_all_summaries_on_the_device(thirty_billion):
    plan = thirty_billion(262_144 + 512)[1]
    assert plan.fits
    assert plan.host_summaries == 0
    page = 48 * 4 * 2 * 16 * 128 * 2
    assert plan.bank > 120 * page  # what a token sees: about 1,900 tokens of each kv head
    assert plan.prefill_summaries < plan.summaries / 16
    assert plan.decode_total + plan.working + plan.activations > plan.limit  # they share their room


@pytest.mark.parametrize("policy", ["sketch", "paper"])
def test_512k_tokens_fit_with_some_summaries_on_the_host(thirty_billion, policy):
    """Sketches: 32 bytes of codes a token and kv head; the paper's group sums: 256 bytes a group of 16 tokens."""
    tokens = 512 * 1024
    backend, plan = thirty_billion(tokens, policy)
    each = tokens * 4 * (32 if policy == "sketch" else 16)
    assert plan.fits
    assert backend.host_summaries == plan.host_layers
    assert plan.host_summaries == plan.host_layers * each
    assert plan.decode_total + RESERVE <= plan.limit
    if policy == "sketch":
        assert plan.decode_total - plan.bank + each + RESERVE > plan.limit  # as few layers as possible
        assert f"those of {plan.host_layers} layers, in host memory in decoding" in plan.table()
    else:
        assert plan.host_layers == 0


def test_a_million_tokens_fit_beside_the_experts_of_most_layers(thirty_billion):
    count = thirty_billion.layers_to_host(2**20)
    backend, plan = thirty_billion(2**20, host_experts=count)
    layer = 3 * 128 * (768 * 2048 + 6 * 16 * 4)  # values of one byte, and a float32 scale for 128 x 128 of them
    assert 0 < count < 24
    assert plan.fits
    assert plan.host_summaries == 0
    assert backend.bank_pages >= 128
    assert plan.host_experts == count * layer
    assert plan.expert_reads == count * layer * 8 // 128
    assert plan.streamed == layer
    assert plan.weights == 30_552_215_552 - count * layer
    assert f"those of {count} layers" in plan.table()
    fewer_backend, fewer = thirty_billion(2**20, host_experts=count - 1)
    assert fewer.host_summaries > 0 or not fewer.fits or fewer_backend.bank_pages < 128
    assert thirty_billion.layers_to_host(256 * 1024) == 0


def test_experts_on_the_host_are_spread_over_the_layers():
    config = ModelConfig.from_hf(make_config("qwen3-30b-a3b-fp8"))
    for count in (1, 7, 10, 24):
        chosen = sorted(placement.hosted_layers(config, count))
        assert len(chosen) == count
        assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(chosen))
    assert placement.hosted_layers(config, 99) == frozenset(range(48))
    assert placement.hosted_layers(replace(config, dense_layers=tuple(range(1, 48))), 5) == {0}
    assert placement.hosted_layers(config, 0) == frozenset()


def test_segments_shorten_before_a_plan_is_refused(thirty_billion):
    long, longer = thirty_billion(131_072 + 512)[1], thirty_billion(512 * 1024)[1]
    assert long.segment == 16_384
    assert longer.segment < 16_384
    assert longer.fits
    assert (long.super_block, longer.super_block) == (65_536, 32_768)
    beyond = thirty_billion(2**20)[1]
    assert not beyond.fits
    with pytest.raises(ValueError, match=r"--ctx \d+ would fit"):
        replace(beyond, host_limit=None).check()


@pytest.mark.parametrize(("hosted", "leaves"), [(r"embedding", 1), (r"layers\.1\.mlp\.(gate|up|down)", 6)])
def test_weights_on_the_host_give_the_same_logits(checkpoint, hosted, leaves):
    device = jax.devices()[0]
    kinds = {kind: jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for kind in ("device", "pinned_host")}
    here, config = load_decoder(checkpoint, dtype="float32", sharding=kinds["device"])
    there, _ = load_decoder(
        checkpoint, dtype="float32", sharding=lambda path: kinds["pinned_host" if re.fullmatch(hosted, path) else "device"]
    )
    assert sum(leaf.sharding.memory_kind == "pinned_host" for leaf in jax.tree.leaves(there)) == leaves
    assert LanguageModel(there, config).host_experts == (leaves == 6)
    tokens = np.arange(20, dtype=np.int32)[None]
    logits = [LanguageModel(decoder, config).logits(tokens, attention="dense") for decoder in (here, there)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("cold", [False, True])
def test_load_is_measured_beside_reading(checkpoint, cold):
    decoder, result = measure(checkpoint, cold=cold, readers=2)
    assert_same_weights(decoder, load_decoder(checkpoint, dtype=decoder.embedding.get_value().dtype)[0])
    assert result["ratio"] == pytest.approx(result["load_seconds"] / result["read_seconds"])
    assert result["pinned_bytes"] == sum(
        leaf.nbytes for leaf in [decoder.embedding.get_value()] if leaf.sharding.memory_kind == "pinned_host"
    )
