"""Logits of an FP8 checkpoint of full width against transformers on its dequantised weights; too large for a stored golden.

    python -m convert.synthetic --like qwen3-30b-a3b-fp8 --layers 2 --out DIR
    python tests/golden/compare_full_width.py transformers DIR OUT.npz      needs torch and transformers; 4 bytes a parameter
    python tests/golden/compare_full_width.py compare DIR OUT.npz           ours, on the first device; needs no torch

Prints for float32 and bfloat16 activations the relative error of the logits (norm of the difference over norm, against transformers in
float32), the median over positions, and the share of positions with the same most likely token; beside bfloat16 the same of transformers
in bfloat16. Exit code 1 when ours differs in float32 by more than 1e-4 or anywhere in the most likely token, or in bfloat16 by more than
2e-2 and also by more than 1.2 times what transformers itself loses. The second bound is for random weights: their router scores and logits
are full of near ties, and an expert chosen otherwise changes a position altogether.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

TOKENS = 256


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
    logits = {}
    with torch.inference_mode():
        for dtype in ("float32", "bfloat16"):
            model = model.to(device, getattr(torch, dtype))
            logits[dtype] = model(torch.from_numpy(tokens)[None].long().to(device)).logits[0].float().cpu().numpy()
    np.savez(out, tokens=tokens, **logits)


def compare(directory: Path, file: Path) -> bool:
    from hga_jax.loading import load_model

    golden = np.load(file)
    expected = golden["float32"]
    theirs = describe("transformers bfloat16", golden["bfloat16"], expected)
    errors = {}
    for dtype in ("float32", "bfloat16"):
        model = load_model(directory, dtype=dtype)
        logits = np.asarray(model.logits(golden["tokens"][None], attention="dense")[0], np.float32)
        errors[dtype], same = describe(f"ours {dtype}", logits, expected)
        if dtype == "float32" and same < 1:
            return False
    return errors["float32"] <= 1e-4 and errors["bfloat16"] <= max(2e-2, 1.2 * theirs[0])


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
    else:
        sys.exit(0 if compare(directory, file) else 1)
