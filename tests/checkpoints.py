"""Small checkpoints that tests break in known ways."""

import json
from pathlib import Path

import jax
import numpy as np

from convert.safetensors_files import SafetensorsDirectory, write_safetensors
from hga_jax.model import Decoder, weight_leaves

GOLDEN = Path(__file__).parent / "golden" / "transformers"


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    opened = SafetensorsDirectory(directory)
    return {name: opened.view(name) for name in opened.tensors}


def write_checkpoint(directory: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    header = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    write_safetensors(directory / "model.safetensors", header, tensors.values())
    return directory


def golden_config(family: str) -> dict:
    return json.loads((GOLDEN / family / "config.json").read_text())


def assert_same_weights(a: Decoder, b: Decoder) -> None:
    """Every leaf, FP8 values and scales included, bit for bit."""
    left, right = weight_leaves(a), weight_leaves(b)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        for x, y in zip(jax.tree.leaves(leaf), jax.tree.leaves(right[path]), strict=True):
            assert x.dtype == y.dtype, path
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path
            assert x.shape == y.shape, path
