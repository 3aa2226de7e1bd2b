"""Somebody else's Qwen3 with routed attention, by a change of one line: the model of google-tunix (pip install google-tunix).

    python examples/tunix_qwen3.py [--length 8192]

Writes a small random Qwen3 checkpoint, loads it with tunix's own loader and with ours, and changes one line of tunix's attention.
Prints the diff; the largest difference of the logits where the windows cover everything (patched tunix against tunix as installed, and
against our dense model); and the loss of one text of `length` random tokens under routed attention, tunix's and ours.
"""

import argparse
import difflib
import inspect
import tempfile
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3.params import create_model_from_safe_tensors

import hga_jax
from convert.synthetic import write_synthetic

BEFORE = "qkv = jnp.einsum('BHGTS,BSHD->BTHGD', attn, value_proj)"
AFTER = "qkv = hga_attention(query_proj.reshape(b, t, qh, d), key_proj, value_proj)"  # the scores above it are dead code now
INSTALLED = textwrap.dedent(inspect.getsource(qwen3.Attention.block))


def patch(config):
    """Change that line of the installed model, in this process only; returns the diff."""
    if INSTALLED.count(BEFORE) != 1:
        raise SystemExit(f"this version of tunix has no line {BEFORE!r}")
    changed = INSTALLED.replace(BEFORE, AFTER)
    names = {**vars(qwen3), "hga_attention": partial(hga_jax.hga_attention, config=config)}
    exec(compile(changed, qwen3.__file__, "exec"), names)
    qwen3.Attention.block = names["block"]
    return difflib.unified_diff(INSTALLED.splitlines(), changed.splitlines(), "tunix/models/qwen3/model.py", "patched", n=0, lineterm="")


def load_tunix(folder, config):
    """The checkpoint through tunix's own loader."""
    settings = qwen3.ModelConfig(
        num_layers=config.layers, vocab_size=config.vocab_size, embed_dim=config.hidden_size, hidden_dim=config.mlp_size,
        num_heads=config.heads, head_dim=config.head_dim, num_kv_heads=config.kv_heads, rope_theta=int(config.rope.theta),
        norm_eps=config.rms_eps, use_tied_embedding=config.tie_embeddings,
    )  # fmt: skip
    return create_model_from_safe_tensors(str(folder), settings)


def logits_of(model, tokens):
    """tunix's logits f32[T, V] of one text, with the attention that is patched in at this moment."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, tokens):
        length = len(tokens)
        mask = jnp.tril(jnp.ones((1, length, length), bool))
        return nnx.merge(graph, state)(tokens[None], jnp.arange(length)[None], None, mask)[0][0]

    return run(state, tokens)


def mean_loss(logits, tokens):
    """Mean negative log-likelihood of each next token, in nats."""
    picked = jnp.take_along_axis(logits[:-1], tokens[1:, None], axis=-1)[:, 0]
    return float(jnp.mean(jax.nn.logsumexp(logits[:-1], axis=-1) - picked))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as parent:
        folder = write_synthetic(Path(parent) / "qwen3", "qwen3-0.6b", layers=2, tiny=True)
        ours = hga_jax.load_model(folder, dtype=jnp.float32)
        theirs = load_tunix(folder, ours.config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, ours.config.vocab_size, options.length), jnp.int32)
    short = tokens[:1024]
    dense, as_installed = ours.logits(short[None], attention="dense")[0], logits_of(theirs, short)

    print("\n".join(patch(hga_jax.HGAConfig(local_chunks=16))))
    routed = logits_of(theirs, short)
    print(f"{len(short)} tokens, windows over everything: logits up to {float(jnp.abs(dense).max()):.1f}, largest difference")
    print(f"  patched tunix - tunix as installed   {float(jnp.abs(routed - as_installed).max()):.1e}")
    print(f"  patched tunix - our dense model      {float(jnp.abs(routed - dense).max()):.1e}")

    patch(hga_jax.HGAConfig())
    routed = mean_loss(logits_of(theirs, tokens), tokens)
    print(f"{len(tokens)} tokens, routed: patched tunix {routed:.6f} nats a token, ours {float(ours.nll(tokens)[0].mean()):.6f}")


if __name__ == "__main__":
    main()
