"""Logits of an FP8 checkpoint of full width against transformers on its dequantised weights; too large for a stored golden.

    python -m convert.synthetic --like qwen3-30b-a3b-fp8 --layers 2 --out DIR
    python tests/golden/compare_full_width.py transformers DIR OUT.npz      needs torch and transformers; 4 bytes a parameter
    python tests/golden/compare_full_width.py compare DIR OUT.npz           ours, on the first device; needs no torch
    python tests/golden/compare_full_width.py trained CHECKPOINT TEXT       16 bits against float32 of a trained model

Random weights are hard on any 16-bit run: router scores and logits (151,936 words) are full of near ties, and an expert chosen otherwise
changes a position altogether. So 16 bits run twice, with their own experts and with those that float32 chooses. An error is the norm of
the difference of the logits over their norm, against transformers in float32; at a clear position the best logit leads by more than four
times the rms error. Two layers, 256 tokens, on a CPU (torch 2.13.0, transformers 5.23.0, JAX 0.12.0), share of same tokens:

    own experts      transformers bfloat16 1.2e-1, 84.0 %    ours bfloat16 4.4e-2, 97.3 %    float16 4.1e-2, 98.1 %
    given experts                          2.7e-2, 95.3 %                  2.8e-3, 99.6 %            1.1e-3, 99.6 %

The same on an H100 (JAX 0.11.2; errors over a sample of 1,194 words), where kernels multiply the experts, given experts, bfloat16: prefill
1.7e-3, 100 %; token by token 5.5e-4, 99.6 %. That is with float16 for what is bounded (hga_jax.quantized.bounded_dtype); with bfloat16 for
everything it was 9.6e-3, 97.7 % on the CPU and 9.4e-3, 98.8 % and 8.2e-3, 98.8 % on the H100. Gaussian noise of 1.0e-2 on the reference
leaves 97.8 % of the tokens, and one rounding to bfloat16 anywhere in the network between 98.4 and 100 % (rounding_budget.py). Trained
models, 1,024 tokens of a novel and of source code: SmolLM2-135M in bfloat16 1.1e-2 and 0.6e-2 with 99.0 and 98.8 % of the tokens, in
float16 1.4e-3 and 0.9e-3 with 100 % twice; Qwen2.5-Coder-0.5B 0.7e-2 and 0.9e-2 with 98.4 and 99.4 %, 0.8e-3 and 1.0e-3 with 99.8 and 99.9
%.

Exit code 1 unless: ours in float32 is within 1e-4 with the same token everywhere; in 16 bits with given experts within 2e-2 (bfloat16) and
2.5e-3 (float16), router scores too, with the same token at 99 % of the clear positions, in float16 of all; and with its own experts
bfloat16 is no worse than 1.2 times transformers.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

TOKENS = 256
TRAINED_TOKENS = 1024


def dequantised(directory: Path) -> dict:
    """Every tensor in float32 by its checkpoint name, read without our code; a scale counts for its 128x128 block."""
    import torch
    from safetensors.torch import load_file

    stored = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= load_file(file)
    tensors = {}
    for name in [name for name in stored if not name.endswith("_scale_inv")]:
        value, scale = stored.pop(name).to(torch.float32), stored.pop(name + "_scale_inv", None)
        if scale is not None:
            whole = scale.to(torch.float32).repeat_interleave(128, 0).repeat_interleave(128, 1)
            value *= whole[: value.shape[0], : value.shape[1]]
        tensors[name] = value
    return tensors


def run_transformers(directory: Path, out: Path) -> None:
    import tempfile

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config")
    config["torch_dtype"] = "float32"
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], TOKENS).astype(np.int32)
    with tempfile.TemporaryDirectory() as plain:
        save_file(dequantised(directory), Path(plain) / "model.safetensors", metadata={"format": "pt"})
        (Path(plain) / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    inputs = torch.from_numpy(tokens)[None].long().to(device)
    routers = [layer.mlp.gate for layer in model.model.layers]
    scores = []

    def choose(router, _, chosen) -> tuple:
        """What a router returns, with the experts it chose in float32."""
        layer, (logits, weights, ids) = routers.index(router), chosen
        if len(scores) < len(routers):
            scores.append(logits)
            return chosen
        ids = scores[layer].topk(router.top_k, dim=-1).indices
        weights = logits.float().softmax(-1).gather(1, ids)
        return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), ids

    def run() -> np.ndarray:
        return model(inputs).logits[0].float().cpu().numpy()

    with torch.inference_mode():
        hooks = [router.register_forward_hook(choose) for router in routers]
        logits = {"float32": run()}
        model = model.to(torch.bfloat16)
        logits["bfloat16_given_experts"] = run()
        for hook in hooks:
            hook.remove()
        logits["bfloat16"] = run()
    np.savez(out, tokens=tokens, scores=torch.stack(scores).cpu().numpy(), **logits)


def compare(directory: Path, file: Path) -> bool:
    import jax.numpy as jnp

    from hga_jax.loading import load_model

    golden = np.load(file)
    tokens, expected, scores = golden["tokens"], golden["float32"], golden["scores"]
    model = load_model(directory, dtype=jnp.float32)
    exact, same_exactly = describe("ours float32", our_logits(model, tokens), expected)

    theirs, _ = describe("transformers bfloat16", golden["bfloat16"], expected)
    describe("transformers bfloat16, given the float32 experts", golden["bfloat16_given_experts"], expected)
    checks = {"float32": exact <= 1e-4 and same_exactly == 1}
    for dtype, most in (("bfloat16", 2e-2), ("float16", 2.5e-3)):
        model = load_model(directory, dtype=jnp.dtype(dtype))
        own, _ = describe(f"ours {dtype}", our_logits(model, tokens), expected)
        logits, own_scores = run_layers(model, tokens)
        agree = compare_experts(dtype, own_scores, scores, model.config.experts_per_token)
        where = agree.all(0)  # what such a position attends to may still have chosen otherwise
        describe(f"ours {dtype}, positions with the float32 experts in all layers", logits[where], expected[where])

        given, given_scores = run_layers(model, tokens, best(scores, model.config.experts_per_token))
        error, same = describe(f"ours {dtype}, given the float32 experts", given, expected)
        score_error = float(np.linalg.norm(given_scores - scores) / np.linalg.norm(scores))
        rms = np.sqrt(np.mean((given - expected) ** 2))
        gaps = lead(expected)
        clear = gaps > 4 * rms
        print(f"router scores then: relative error {score_error:.2e}")
        print(f"rms error of a logit then: {rms:.2e}; the best leads by {np.median(gaps):.2e} at the median position")
        _, same_clear = describe("where the best leads by more than four times that", given[clear], expected[clear])
        print(f"Gaussian noise of that size on the reference leaves {same_under_noise(expected, rms):.2%} of the most likely tokens")
        checks |= {
            f"{dtype} given experts": error <= most and score_error <= most,
            f"{dtype} at clear positions": same_clear >= 0.99,
            dtype: own <= 1.2 * theirs if dtype == "bfloat16" else same >= 0.99,
        }
    print("fails:", ", ".join(name for name, passed in checks.items() if not passed) or "nothing")
    return all(checks.values())


def compare_trained(checkpoint: Path, text: Path) -> None:
    """The same figures of a trained model, ours in 16 bits against ours in float32."""
    import jax.numpy as jnp

    from hga_jax.loading import load_model

    models = [load_model(checkpoint, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)]
    tokens = models[0].encode_prompt(text.read_text()[: 8 * TRAINED_TOKENS], chat=False)[:TRAINED_TOKENS]
    exact, *rounded = (our_logits(model, tokens) for model in models)
    for logits, model in zip(rounded, models[1:], strict=True):
        describe(f"{checkpoint.name} on {text.name}, {np.dtype(model.dtype)}", logits, exact)


def our_logits(model, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(model.logits(tokens[None], attention="dense")[0], np.float32)


def run_layers(model, tokens: np.ndarray, experts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, V] and router scores [L, T, E], with the experts [L, T, k] in place of those that the routers choose."""
    from unittest import mock

    import jax
    import jax.numpy as jnp

    from hga_jax.backend import DenseAttention

    decoder, config, backend, count = model.params, model.config, DenseAttention(), len(tokens)
    choose, seen = sys.modules["hga_jax.model"].moe_routing, []

    def routing(scores, choices, *, renormalise, given):
        seen.append(scores)
        if given is None:
            return choose(scores, choices, renormalise=renormalise)
        weights = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), given, axis=-1)
        return given, weights / weights.sum(-1, keepdims=True)

    @jax.jit
    def run_layer(layer, x, given):
        state = backend.init_state(count, config.kv_heads, config.head_dim, model.kv_dtype)
        with mock.patch("hga_jax.model.moe_routing", partial(routing, given=given)):
            x, _, _ = layer.prefill(x, jnp.int32(0), jnp.int32(count), state, backend)
        return x, seen.pop()

    x, scores = decoder.embed(jnp.asarray(tokens)), []
    for index, layer in enumerate(decoder.layers):
        x, found = run_layer(layer, x, None if experts is None else jnp.asarray(experts[index]))
        scores.append(np.asarray(found))
    return np.asarray(decoder.head(x), np.float32), np.stack(scores)


def best(scores: np.ndarray, choices: int) -> np.ndarray:
    """The chosen experts, in ascending order of their number."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :choices], axis=-1).astype(np.int32)


def compare_experts(dtype: str, scores: np.ndarray, expected: np.ndarray, choices: int) -> np.ndarray:
    """Per layer and position, whether the same experts are chosen; prints how often, and by how much the last chosen one leads."""
    agree = (best(scores, choices) == best(expected, choices)).all(-1)
    probabilities = np.exp(expected - expected.max(-1, keepdims=True))
    ordered = np.sort(probabilities / probabilities.sum(-1, keepdims=True), axis=-1)
    margins = ordered[..., -choices] - ordered[..., -choices - 1]
    for layer, (same, margin) in enumerate(zip(agree, margins, strict=True)):
        most = np.max(margin[~same], initial=0)
        print(f"layer {layer}: ours {dtype} chooses the float32 experts at {same.mean():.2%} of positions; the last one leads")
        print(f"    by a probability of {np.median(margin[same]):.1e} there (median), of {most:.1e} at most elsewhere")
    return agree


def lead(logits: np.ndarray) -> np.ndarray:
    """By how much the best logit of each position leads."""
    first, second = np.moveaxis(np.partition(logits, (-2, -1), axis=-1)[:, -2:][:, ::-1], -1, 0)
    return first - second


def same_under_noise(logits: np.ndarray, rms: float, draws: int = 200) -> float:
    """Expected share of positions that keep their most likely token when each logit gets independent noise; the 64 best are in the race."""
    top = np.sort(logits, axis=-1)[:, :-65:-1]
    noise = np.random.default_rng(1).standard_normal((draws, *top.shape), np.float32)
    return float(((top + rms * noise).argmax(-1) == 0).mean())


def describe(name: str, logits: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(relative error, share of positions with the same most likely token)."""
    off = np.linalg.norm(logits - expected, axis=1)
    error = float(np.linalg.norm(off) / np.linalg.norm(expected))
    median = np.median(off / np.linalg.norm(expected, axis=1))
    same = float((logits.argmax(-1) == expected.argmax(-1)).mean())
    print(f"{name}: relative error {error:.2e}, median position {median:.2e}, same argmax at {same:.2%} of {len(logits)}", flush=True)
    return error, same


if __name__ == "__main__":
    what, directory, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if what == "transformers":
        run_transformers(directory, file)
    elif what == "trained":
        compare_trained(directory, file)
    else:
        sys.exit(0 if compare(directory, file) else 1)
