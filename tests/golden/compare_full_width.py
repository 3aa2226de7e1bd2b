"""Logits of an FP8 checkpoint of full width against transformers on its dequantised weights; too large for a stored golden.

    python -m convert.synthetic --like qwen3-30b-a3b-fp8 --layers 2 --out DIR
    python tests/golden/compare_full_width.py transformers DIR OUT.npz      needs torch and transformers; 4 bytes a parameter
    python tests/golden/compare_full_width.py compare DIR OUT.npz           ours, on the first device

Prints the relative error of the bfloat16 logits (norm of the difference over norm) and the share of positions with the same most likely
token; exit code 1 beyond 2e-2 or below 99 %. Of the positions that differ it says how far apart the two tokens are in transformers'
logits: random weights make many near ties.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

TOKENS = 256


def dequantised(directory: Path) -> dict:
    """Every tensor in float32 by its checkpoint name; a scale counts for its 128x128 block."""
    import torch

    from convert.safetensors_files import SafetensorsDirectory

    files = SafetensorsDirectory(directory)
    tensors = {}
    for name in files.tensors:
        if name.endswith("_scale_inv"):
            continue
        value = files.view(name).astype(np.float32)
        if name + "_scale_inv" in files.tensors:
            scale = files.view(name + "_scale_inv").astype(np.float32)
            value *= scale.repeat(128, 0).repeat(128, 1)[: value.shape[0], : value.shape[1]]
        tensors[name] = torch.from_numpy(value)
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
    with torch.inference_mode():
        logits = model.to(device)(torch.from_numpy(tokens)[None].long().to(device)).logits[0]
    np.savez(out, tokens=tokens, logits=logits.float().cpu().numpy())


def compare(directory: Path, file: Path) -> bool:
    import jax.numpy as jnp

    from hga_jax.loading import load_model

    golden = np.load(file)
    expected = golden["logits"]
    model = load_model(directory, dtype=jnp.bfloat16)
    logits = np.asarray(model.logits(golden["tokens"][None], attention="dense")[0], np.float32)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    theirs, ours = expected.argmax(-1), logits.argmax(-1)
    same = (theirs == ours).mean()
    rows = np.arange(len(ours))
    gaps = (expected[rows, theirs] - expected[rows, ours])[theirs != ours] / expected.std()
    print(f"{directory}: relative error {error:.2e}, same argmax at {same:.2%} of {len(ours)} positions")
    print(f"gaps between the two tokens where they differ, in standard deviations of the logits: {np.round(np.sort(gaps), 4).tolist()}")
    return bool(error <= 2e-2 and same >= 0.99)


if __name__ == "__main__":
    what, directory, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if what == "transformers":
        run_transformers(directory, file)
    else:
        sys.exit(0 if compare(directory, file) else 1)
