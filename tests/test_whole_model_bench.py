"""The arithmetic of the whole-model benchmark: which part a kernel belongs to, bytes a token must read, the estimate for another card."""

from __future__ import annotations

import pytest

from convert.synthetic import make_config
from hga_jax.bench._whole_model import Case, decode_bytes, estimate_5090, parts
from hga_jax.config import HGAConfig, ModelConfig

CONFIG = ModelConfig.from_hf(make_config("qwen3-30b-a3b-fp8"))
FIGURES = {"decode_fetched_fraction": 0.03, "bank_hit_rate": 0.5, "history_tier": "host"}


def test_kernels_by_part():
    names = [
        "moe_decode_down",
        "fp8_matvec_5120x2048",
        "fp8_matvec_128x2048",
        "fp8_matvec_151936x2048",
        "page_attention",
        "sketch_scan_beside_windows",
        "x",
    ]
    found = parts({name: {"launches": 4, "total_us": 8.0} for name in names}, 2)
    assert set(found) == {"experts", "projections", "router", "head", "attention", "routing", "other"}
    assert all(part == {"us": 4.0, "launches": 2.0} for part in found.values())


def test_bytes_of_a_token():
    found = decode_bytes(CONFIG, FIGURES, 65536)
    assert found["experts"] == ("hbm_gb_s", 8 * 3 * 768 * 2048)  # 37.7 MB: 8 experts of gate, up and down
    assert found["projections"] == ("hbm_gb_s", 2048 * (4096 + 512 + 512 + 4096))
    assert found["attention"] == ("pcie_gb_s", pytest.approx(0.03 * 65536 * 4 * 128 * 2 * 2 / 2))  # half of the pages lie in the bank


def test_a_slower_memory_stretches_what_is_not_launching():
    figures = {"decode_parts": {"experts": {"us": 22.3, "launches": 1.0}}, "decode_bytes": {"experts": ("hbm_gb_s", 1.0)}}
    assert estimate_5090(figures, {"hbm_gb_s": 2 * 1792.0}, 10) == pytest.approx(1e6 / (10 * (2.3 + 2 * 20)))
    assert estimate_5090(figures, {"hbm_gb_s": 1792.0}, 10) == pytest.approx(1e6 / (10 * 22.3))


@pytest.mark.parametrize(("prompt", "new", "expected"), [(262_144, 512, 261_632), (262_144, 8, 262_080), (65_536, 512, 65_536)])
def test_a_prompt_leaves_room_for_the_answer(prompt, new, expected):
    assert Case(prompt, new, "auto", "hga", HGAConfig()).within(262_144).prompt_tokens == expected
