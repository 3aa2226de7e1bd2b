"""Fine-tuning with routed attention: gradients flow through the tokens each query opened.

    python examples/finetune.py [--model PATH | --model built-in] [--text FILE] [--length 512] [--steps 30]

Takes a model (default: a small random one), trains all its weights on pieces of a text (default: a made-up log) with optax, and prints the
loss of the training steps under routed attention, and that of a piece not trained on, before and after, routed and dense.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hga_jax
from hga_jax.backend import Stats
from hga_jax.demo import build_prompt
from hga_jax.model import Decoder


@dataclass(frozen=True)
class WholeText(hga_jax.AttentionBackend):
    """An attention backend for training: every call sees one whole text, and nothing is kept for later."""

    config: hga_jax.HGAConfig

    def prefill(self, query, key, value, state, count):
        return hga_jax.hga_attention(query[None], key[None], value[None], config=self.config)[0], state, Stats.zero()


def mean_loss(decoder, tokens, attention):
    """Mean negative log-likelihood of tokens[1:], in nats; tokens i32[T]."""
    x = decoder.embed(tokens)
    for layer in decoder.layers:
        run = jax.checkpoint(lambda layer, x: layer.prefill(x, jnp.int32(0), jnp.int32(len(tokens)), None, attention)[0])
        x = run(layer, x)
    return optax.softmax_cross_entropy_with_integer_labels(decoder.head(x)[:-1], tokens[1:]).mean()


def random_model():
    """Two layers that read bytes."""
    config = hga_jax.ModelConfig(
        model_type="qwen3", vocab_size=128, hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_size=128, native_context=8192,
        qk_norm=True, tie_embeddings=True,
    )  # fmt: skip
    return hga_jax.LanguageModel(Decoder(config), config)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)
    if options.model is None:
        model, rate = random_model(), 1e-2
    else:
        model, rate = hga_jax.load_model(None if options.model == "built-in" else options.model, dtype=jnp.float32), 1e-5
    text = options.text.read_text(encoding="utf-8") if options.text else build_prompt(entries=300)
    ids = model.tokenizer.encode(text) if model.tokenizer else np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32)
    pieces = [ids[i : i + options.length] for i in range(0, len(ids) - options.length + 1, options.length)]
    if len(pieces) < 2:
        raise SystemExit(f"the text has {len(ids)} tokens: --length {options.length} needs at least {2 * options.length}")
    held_out, pieces = pieces[-1], pieces[:-1]

    # Narrow windows and a high threshold, so that texts this short are routed at all; longer ones take the defaults.
    narrow = hga_jax.HGAConfig(sink_chunks=1, local_chunks=1, threshold=0.02)
    config = narrow if options.length < 2048 else hga_jax.HGAConfig()
    routed, optimizer = WholeText(config), optax.adam(rate)

    @jax.jit
    def step(decoder, memory, tokens):
        loss, gradients = jax.value_and_grad(mean_loss)(decoder, tokens, routed)
        updates, memory = optimizer.update(gradients, memory)
        return optax.apply_updates(decoder, updates), memory, loss

    def report(moment, decoder):
        after = hga_jax.LanguageModel(decoder, model.config)
        losses = {name: after.nll(held_out, attention=after.backend(name, config))[0].mean() for name in ("hga", "dense")}
        print(f"{moment}: held-out piece, routed {losses['hga']:.3f} nats a token, dense {losses['dense']:.3f}")

    decoder, memory = model.params, optimizer.init(model.params)
    report("before", decoder)
    for i in range(options.steps):
        decoder, memory, loss = step(decoder, memory, jnp.asarray(pieces[i % len(pieces)]))
        if i % 10 == 0 or i == options.steps - 1:
            print(f"step {i:3}: loss {float(loss):.3f}")
    report("after", decoder)


if __name__ == "__main__":
    main()
