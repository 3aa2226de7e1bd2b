"""The byte table decides the tier, and holds at a million tokens."""

from dataclasses import replace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest

from hga_jax.attention import HGAAttention
from hga_jax.backend import DenseAttention
from hga_jax.config import HGAConfig, ModelConfig
from hga_jax.decoding import cannot_decode
from hga_jax.plan import GIB, RESERVE, place_history

MODEL = ModelConfig(
    model_type="qwen3", vocab_size=512, hidden_size=256, layers=2, heads=32, kv_heads=4, head_dim=128, mlp_size=256, native_context=2**20
)
TOKENS = 2**20


def gpu(gib):
    device = Mock(spec=jax.Device, platform="gpu", device_kind="made-up GPU", client=Mock(platform_version="made up"))
    device.memory_stats = lambda: {"bytes_limit": int(gib * GIB)}
    return device


def placed(kv_store, gib, backend=None, tokens=TOKENS, layers=MODEL.layers):
    return place_history(
        replace(MODEL, layers=layers), backend or HGAAttention(HGAConfig()), tokens, jnp.bfloat16, kv_store, device=gpu(gib)
    )


def test_a_million_tokens_are_counted_exactly():
    backend, plan = placed("host", 8)
    page_bytes = 4 * TOKENS * 2 * 128 * 2  # kv heads, tokens, K and V, head dim, bfloat16: of one layer
    assert plan.history == plan.host == 2 * page_bytes
    assert plan.working == page_bytes
    energies = 2 * 4 * 128 / 2 * 4  # of the first queries, by rotary pair
    assert plan.summaries == pytest.approx(2 * 4 * TOKENS * (32 + 2 + 128 * 2 / 64 + 4 / 16) + energies)  # codes, scale, mean, stamp
    assert plan.bank == pytest.approx(2 * 4 * TOKENS / 16 / 8 * (2 * 16 * 128 * 2 + 4) + 2 * 4 * TOKENS / 16 * 4)  # an eighth, and tables
    assert plan.windows == 2 * 4 * 11 * 64 * 2 * 128 * 2
    lasting = plan.weights + plan.windows
    assert plan.prefill_total == lasting + plan.summaries + plan.working + plan.activations  # two layers: both summaries on the device
    assert plan.decode_total == lasting + plan.summaries + plan.bank
    assert plan.total == max(plan.prefill_total, plan.decode_total) + plan.reserve
    assert plan.reserve == RESERVE
    assert backend.tier == plan.tier == "host"


def test_auto_takes_the_device_while_the_plan_fits():
    assert placed("auto", 80)[0].tier == "device"
    backend, plan = placed("auto", 5)
    assert (backend.tier, plan.fits) == ("host", True)
    assert placed("auto", 80, HGAAttention(HGAConfig(), tier="host"))[0].tier == "host"
    assert placed("device", 4)[1].fits is False


def test_a_bank_takes_what_prefill_gives_up():
    """64 layers, 65,536 tokens: the bank is bounded by the device, not by its share of the history."""
    roomy = placed("host", 80, tokens=65536, layers=64)[1]
    enough = placed("host", roomy.decode_total / GIB + RESERVE / GIB, tokens=65536, layers=64)[1]
    half = placed("host", (roomy.decode_total - roomy.bank / 2) / GIB + RESERVE / GIB, tokens=65536, layers=64)[1]
    assert enough.bank == pytest.approx(roomy.bank, rel=0.01)
    assert half.bank == pytest.approx(roomy.bank / 2, rel=0.01)
    assert half.fits
    assert half.total - half.reserve < half.lasting + half.summaries + half.bank + half.working + half.activations


def test_a_last_small_piece_belongs_to_the_reserve():
    """What a bank leaves is less than a page of all layers, and the allocator gives such a piece out whole."""
    full = placed("host", placed("host", 80, tokens=65536, layers=64)[1].decode_total / GIB, tokens=65536, layers=64)[1]
    assert full.bank > 0
    assert RESERVE < full.reserve < RESERVE + 2**20
    assert full.total == full.limit


def test_dense_attention_stays_on_the_device():
    assert placed("auto", 1, DenseAttention())[1].tier == "device"
    with pytest.raises(ValueError, match="--kv-store host needs attention hga"):
        placed("host", 80, DenseAttention())


def test_the_table_says_where_the_history_is_and_what_a_knob_frees():
    assert "tier: host" in placed("host", 8)[1].table()
    with pytest.raises(ValueError, match=r"--kv-store host would free 4\.00 GiB"):
        placed("device", 3)[1].check()


def test_what_the_kernels_cannot_index_is_said_beforehand():
    assert cannot_decode(HGAConfig(), 32, 4, TOKENS, 128) is None
    assert cannot_decode(HGAConfig(), 32, 4, 2 * TOKENS - 64, 128) is None
    assert "pass 2^31 elements" in cannot_decode(HGAConfig(), 32, 4, 2 * TOKENS, 128)
    assert "powers of two" in cannot_decode(HGAConfig(chunk_size=48, group_size=16), 32, 4, TOKENS, 128)
    assert "page masks hold 31" in cannot_decode(HGAConfig(policy="paper"), 32, 1, TOKENS, 128)
