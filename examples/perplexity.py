"""Perplexity of a text file in a jit-compiled loop, dense beside hierarchical global attention.

    python examples/perplexity.py FILE [--length 4096] [--model PATH]

Prints, for windows of `length` tokens: nats per token under both, and how long each took.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import hga_jax


def mean_loss(model, tokens, backend):
    """Mean negative log-likelihood (nats) of tokens[1:], teacher-forced; tokens i32[1, T]."""
    logits = model.logits(tokens, attention=backend)[:, :-1]
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--model")
    options = parser.parse_args()
    model = hga_jax.load_model(options.model)
    ids = model.tokenizer.encode(options.file.read_text(encoding="utf-8"))
    windows = [ids[i : i + options.length] for i in range(0, len(ids) - options.length + 1, options.length)]
    if not windows:
        raise SystemExit(f"{options.file} has {len(ids)} tokens, fewer than --length {options.length}")
    step = jax.jit(mean_loss, static_argnames="backend")
    for name in ("dense", "hga"):
        backend = model.backend(name)
        start = time.perf_counter()
        losses = [float(step(model, window[None], backend)) for window in windows]
        print(f"{name:6} {sum(losses) / len(losses):.4f} nats a token over {len(windows)} windows, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
