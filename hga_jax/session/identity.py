"""What must be equal for stored K/V to be used again: the weights, the model's settings, the attention, the number format."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hga_jax.attention import HGAAttention
from hga_jax.backend import AttentionBackend, DenseAttention
from hga_jax.config import HGAConfig
from hga_jax.model import Decoder, weight_leaves
from hga_jax.session.state_format import has_energies
from hga_jax.sketches import ROTATION_VERSION

# Settings younger than the format, with what was done before them: left out where they say that, so that histories stored before stay good.
LATER_SETTINGS = {"scan_pairs": 0, "pairs_threshold": 0.0, "scan_stride": 1, "votes": 0, "sketch_pairs": 0}
STAMPS_VERSION = 2  # how many votes a page has, counted up to votes.ENOUGH
ENERGIES_VERSION = 1  # stored with every reuse point: what prefill chooses rotary pairs by
SAMPLES = 1024  # values of each weight that its fingerprint covers, evenly spread: other weights differ nearly everywhere


@jax.jit
def _samples(leaves: list[Array]) -> list[Array]:
    def one(leaf: Array) -> Array:
        flat = leaf.reshape(-1)
        return flat[:: max(flat.shape[0] // SAMPLES, 1)].astype(jnp.float32)

    return [one(leaf) for leaf in leaves]


def weights_fingerprint(decoder: Decoder) -> str:
    """A hash of names, shapes, dtypes and samples of all weights: the same for the same checkpoint on any device."""
    digest = hashlib.sha256()
    layers: dict[str, list[tuple[str, Array]]] = {}
    for path, weight in weight_leaves(decoder).items():
        unit = ".".join(path.split(".")[:2]) if path.startswith("layers.") else path  # a layer at a time: all layers share one program
        for i, leaf in enumerate(jax.tree.leaves(weight)):
            layers.setdefault(unit, []).append((f"{path}/{i}", leaf))
    for named in layers.values():
        samples = _samples([leaf for _, leaf in named])
        for (name, leaf), values in zip(named, samples, strict=True):
            digest.update(f"{name} {leaf.shape} {jnp.dtype(leaf.dtype).name}".encode())
            digest.update(np.asarray(values).tobytes())
    return digest.hexdigest()[:32]


def describe(model: Any, backend: AttentionBackend, energies: bool = True) -> dict[str, Any]:
    """The identity of a LanguageModel's K/V under an attention backend, as JSON values. Raises ValueError for an unknown one.

    energies: whether they are stored where there are such.
    """
    from convert.checkpoint import config_to_json

    if isinstance(backend, HGAAttention):
        attention = {"kind": "hga", "rotation": ROTATION_VERSION} | asdict(backend.config)
        attention = {name: value for name, value in attention.items() if LATER_SETTINGS.get(name, ...) != value}
        if energies and has_energies(backend.config):
            attention["energies"] = ENERGIES_VERSION
        if backend.config.counts_votes:
            attention["stamps"] = STAMPS_VERSION
        else:
            attention = {name: value for name, value in attention.items() if name not in ("vote_share", "vote_stride")}
    elif isinstance(backend, DenseAttention):
        attention = {"kind": "dense", "page_size": backend.page_size}
    else:
        raise ValueError(f"sessions store hga and dense attention only, not {type(backend).__name__}")
    config = config_to_json(model.config)
    rope = config.pop("rope")
    for absent in ("bos_token_id", "eos_token_ids"):
        config.pop(absent)
    weights, dtype = weights_fingerprint(model.params), jnp.dtype(model.kv_dtype).name
    found = {"model": config, "weights": weights, "rope": rope, "attention": attention, "dtype": dtype}
    return json.loads(json.dumps(found))  # as it will be read back: lists for tuples


def as_begun(stored: dict[str, Any], config: HGAConfig) -> HGAConfig:
    """config, with settings that were younger than what is stored, and are as they come, the way things were done then."""
    absent = {name: before for name, before in LATER_SETTINGS.items() if name not in stored["attention"]}
    return replace(config, **{name: before for name, before in absent.items() if getattr(config, name) == getattr(HGAConfig(), name)})


def root_id(identity: dict[str, Any]) -> str:
    """The id that the first block of every sequence follows."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def differences(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Where two identities differ, one short phrase each."""
    found = []
    for part in sorted(stored.keys() | given.keys()):
        old, new = stored.get(part), given.get(part)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            old = old | ({"screening": "off"} if old.get("screening") == "auto" else {})  # its name while it went by the history's length
            found += [
                f"{part} {key} {old.get(key)} (now {new.get(key)})"
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            ]
        else:
            found.append("other weights" if part == "weights" else f"{part} {old} (now {new})")
    return found
