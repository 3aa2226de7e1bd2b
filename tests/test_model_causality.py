"""What a logit may depend on: never on a later token. And decode continues prefill, wherever the cut falls."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax import programs
from hga_jax.backend import DenseAttention
from hga_jax.config import HGAConfig
from hga_jax.loading import load_model

GOLDEN = Path(__file__).parent / "golden" / "transformers"
PAPER = HGAConfig(policy="paper", chunk_size=16, group_size=4, sink_chunks=1, local_chunks=1, top_chunks=2, top_groups=4)


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "qwen3", dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokens():
    return np.load(GOLDEN / "qwen3.npz")["tokens"]


@pytest.mark.parametrize("last_kept", [0, 15, 16, 63, 64, 100, 198])
def test_dense_logits_do_not_see_later_tokens(model, tokens, last_kept):
    changed = tokens.copy()
    changed[last_kept + 1 :] = (changed[last_kept + 1 :] + 1) % model.config.vocab_size
    both = model.logits(np.stack([tokens, changed]), attention="dense")
    np.testing.assert_array_equal(both[0, : last_kept + 1], both[1, : last_kept + 1])
    assert not np.array_equal(both[0, last_kept + 1], both[1, last_kept + 1])


def test_paper_policy_shares_its_cuts_inside_a_chunk(model, tokens):
    """The paper's shared cut lets later queries of a chunk displace pages of earlier ones: it looks ahead, inside the chunk only.

    So logits of earlier chunks must not move, and somewhere in the chunk of the change they do: this is the policy, not a bug of ours.
    """
    backend, size = model.backend("hga", PAPER), PAPER.chunk_size
    moved = 0
    for last_kept in range(100, 180, 3):
        changed = tokens.copy()
        changed[last_kept + 1 :] = (changed[last_kept + 1 :] + 1) % model.config.vocab_size
        both = np.asarray(model.logits(np.stack([tokens, changed]), attention=backend))
        chunk = (last_kept + 1) // size * size
        np.testing.assert_array_equal(both[0, :chunk], both[1, :chunk])
        moved += not np.array_equal(both[0, chunk : last_kept + 1], both[1, chunk : last_kept + 1])
    assert moved > 0


@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 63, 64, 65, 128, 150])
def test_dense_decode_continues_prefill(model, tokens, prompt):
    """Prefill n and decode m tokens one by one: the logits of prefilling n + m."""
    backend = DenseAttention(query_block=32, key_block=64)
    whole, decode = model.logits(tokens[None], attention=backend)[0], jax.jit(programs.decode_step, static_argnums=4)
    states = programs.new_states(model.params, backend, 200, jnp.float32)
    for block in programs.prefill_blocks(model.params, tokens[:prompt], states, backend, segment=64):
        states = block.states
    for position in range(prompt, prompt + 20):
        logits, states, _ = decode(model.params, jnp.int32(tokens[position]), jnp.int32(position), states, backend)
        np.testing.assert_allclose(logits, whole[position], atol=1e-4, rtol=0)


@pytest.mark.parametrize("sizes", [(200,), (64, 136), (50, 100, 50), (1, 1, 198)])
def test_prefill_may_come_in_several_calls(model, tokens, sizes):
    """Super-blocks and later turns start anywhere, also inside a chunk."""
    backend = DenseAttention(query_block=32, key_block=64)
    whole = model.logits(tokens[None], attention=backend)[0]
    states, first = programs.new_states(model.params, backend, 200, jnp.float32), 0
    for size in sizes:
        for block in programs.prefill_blocks(model.params, tokens[first : first + size], states, backend, first=first, segment=64):
            states = block.states
        first += size
        np.testing.assert_allclose(
            programs.row_logits(model.params, block.x, jnp.int32(block.count - 1)), whole[first - 1], atol=1e-4, rtol=0
        )
