"""Our decoder against transformers: the same files on disk, the same logits, for every family and for FP8."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax.backend import DenseAttention
from hga_jax.loading import load_model

GOLDEN = Path(__file__).parent / "golden" / "transformers"
FAMILIES = ("qwen3", "qwen3_moe", "qwen3_moe_fp8", "qwen2", "llama_llama3", "llama_yarn", "llama_linear", "mistral")


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_logits_equal_transformers(family):
    golden = np.load(GOLDEN / f"{family}.npz")
    model = load_model(GOLDEN / family, dtype=jnp.float32)
    logits = model.logits(golden["tokens"][None], attention="dense")[0]
    # Float32 on both sides; the FP8 golden was made with the dequantised weights. Logits are of order 1 to 10.
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 2.5e-2), ("float16", 2.5e-3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_logits_in_sixteen_bits(family, dtype, most):
    """Float16 rounds an eighth of what bfloat16 does; one rounding of a logit is 2e-3 and 2.5e-4.

    Where two experts tie, rounding picks one: that position, and those that attend to it, are other sums than the golden's. So mixtures
    count by their median position.
    """
    golden = np.load(GOLDEN / f"{family}.npz")
    logits = load_model(GOLDEN / family, dtype=jnp.dtype(dtype)).logits(golden["tokens"][None], attention="dense")[0]
    off, size = (np.linalg.norm(x, axis=-1) for x in (logits - golden["logits"], golden["logits"]))
    assert (np.median(off / size) if "moe" in family else np.linalg.norm(off) / np.linalg.norm(size)) < most


def test_sharded_checkpoint_gives_the_same_logits():
    golden = np.load(GOLDEN / "qwen3_moe.npz")
    model = load_model(GOLDEN / "qwen3_moe_sharded", dtype=jnp.float32)
    np.testing.assert_allclose(model.logits(golden["tokens"][None], attention="dense")[0], golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("block", [16, 48, 200])
def test_block_sizes_of_dense_attention_do_not_matter(block):
    golden = np.load(GOLDEN / "qwen3.npz")
    model = load_model(GOLDEN / "qwen3", dtype=jnp.float32)
    backend = DenseAttention(query_block=block, key_block=64)
    np.testing.assert_allclose(model.logits(golden["tokens"][None], attention=backend)[0], golden["logits"], atol=1e-4, rtol=0)


def test_a_batch_is_its_rows():
    golden = np.load(GOLDEN / "qwen2.npz")
    model = load_model(GOLDEN / "qwen2", dtype=jnp.float32)
    tokens = np.stack([golden["tokens"], golden["tokens"][::-1]])
    both = model.logits(tokens, attention="dense")
    np.testing.assert_allclose(both[0], golden["logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(both[1], model.logits(tokens[1:], attention="dense")[0], atol=1e-5, rtol=0)
