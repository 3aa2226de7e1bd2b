"""Our own checkpoint directory: Orbax arrays, the config, the tokenizer.

    config.json         format, version, dtype, the ModelConfig and the source's own config
    params/<unit>/      one Orbax checkpoint per unit: a layer ("layers.0") or a part outside them ("embedding", "final_norm", "lm_head"),
                        laid out as Orbax lays out the items of a composite checkpoint; FP8 weights are {"values", "scales"}
    tokenizer files     as transformers writes them

One item per unit keeps both directions streaming: no more than a layer is in host memory, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from convert.checking import raise_problems
from convert.stream import unit_of
from hga_jax.config import LinearScaling, Llama3Scaling, ModelConfig, RopeConfig, YarnScaling

FORMAT = "hga_jax checkpoint"
VERSION = 1
CONFIG = "config.json"
PARAMS = "params"
SCALINGS = {kind.__name__: kind for kind in (LinearScaling, Llama3Scaling, YarnScaling)}


@dataclass(frozen=True)
class Settings:
    """What config.json says: the model, the dtype of its plain weights, and the config it was converted from."""

    config: ModelConfig
    dtype: np.dtype
    source: dict[str, Any]


def is_converted(path: Path) -> bool:
    """Whether a directory is one that `python -m convert` wrote."""
    try:
        return json.loads((path / CONFIG).read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def write_settings(path: Path, settings: Settings) -> None:
    """Write config.json; the last thing a conversion does."""
    text = {
        "format": FORMAT, "format_version": VERSION, "dtype": settings.dtype.name, "model": config_to_json(settings.config),
        "eos_token_id": list(settings.config.eos_token_ids), "source": settings.source,
    }  # fmt: skip
    (path / CONFIG).write_text(json.dumps(text, indent=1, default=str) + "\n")


def read_settings(path: Path) -> Settings:
    """Read config.json. Raises ValueError when its version is another or a field is missing."""
    raw = json.loads((path / CONFIG).read_text())
    if raw.get("format_version") != VERSION:
        raise ValueError(f"{path / CONFIG}: format_version={raw.get('format_version')}, this program reads {VERSION}: convert again")
    try:
        return Settings(config_from_json(raw["model"]), jnp.dtype(raw["dtype"]), raw["source"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / CONFIG}: damaged ({type(error).__name__}: {error}): convert again") from error


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """A ModelConfig as plain JSON values; config_from_json rebuilds it exactly."""
    raw = asdict(config)
    if config.rope.scaling is not None:
        raw["rope"]["scaling"] = {"kind": type(config.rope.scaling).__name__} | asdict(config.rope.scaling)
    return raw


def config_from_json(raw: Mapping[str, Any]) -> ModelConfig:
    """The inverse of config_to_json. Raises KeyError or TypeError for fields that are missing or unknown."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    if absent := {item.name for item in fields(ModelConfig)} - values.keys():
        raise KeyError(", ".join(sorted(absent)))
    return ModelConfig(**values | {"rope": rope_from_json(raw["rope"])})


def rope_from_json(raw: Mapping[str, Any]) -> RopeConfig:
    """The rope of a model as config_to_json wrote it."""
    scaling = raw["scaling"]
    if scaling is not None:
        scaling = SCALINGS[scaling["kind"]](**{key: value for key, value in scaling.items() if key != "kind"})
    return RopeConfig(raw["theta"], scaling)


def save_units(path: Path, arrays: Iterable[tuple[str, jax.Array]]) -> None:
    """Write arrays (by array key, those of a unit one after another) below `path`/params, a unit at a time."""
    unit, held = None, {}
    with _checkpointer() as checkpointer:
        for key, array in arrays:
            if unit_of(key) != unit:
                _save_unit(checkpointer, path, unit, held)
                unit, held = unit_of(key), {}
            held[_inside(key)] = array
            del array
        _save_unit(checkpointer, path, unit, held)


def restore(
    path: Path,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    place: Callable[[str], jax.sharding.Sharding],
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Yield every array, restored straight onto its device; plain ones are cast to the target's dtype.

    Raises one ValueError of all missing, unexpected, misshapen and wrong-dtype arrays before anything is restored.
    """
    with _checkpointer() as checkpointer:
        stored = _stored(checkpointer, path)
        _check(path, stored, targets)
        total, done = sum(stored[key].size * stored[key].dtype.itemsize for key in targets), 0
        units: dict[str, list[str]] = {}
        for key in targets:
            units.setdefault(unit_of(key), []).append(key)
        for unit, keys in units.items():
            arguments = {_inside(key): ocp.ArrayRestoreArgs(sharding=place(key), dtype=targets[key].dtype) for key in keys}
            with _damage(path / PARAMS / unit):
                tree = checkpointer.restore(path.absolute() / PARAMS / unit, args=ocp.args.PyTreeRestore(restore_args=_nest(arguments)))
                flat = jax.block_until_ready(_flatten(tree))
            for key in keys:
                done += stored[key].size * stored[key].dtype.itemsize
                yield key, flat.pop(_inside(key))
            if progress is not None:
                progress(done, total)


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    """Uncompressed: weights barely shrink, and decompressing is slower than a disk. Orbax's per-save log lines are not for users."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)) as checkpointer:
            yield checkpointer
    finally:
        logger.setLevel(level)


def _save_unit(checkpointer: ocp.Checkpointer, path: Path, unit: str | None, held: Mapping[str, jax.Array]) -> None:
    if unit is not None:
        checkpointer.save(path.absolute() / PARAMS / unit, args=ocp.args.PyTreeSave(_nest(held)))


def _inside(key: str) -> str:
    """An array key within its unit: "layers.0.mlp.up" is "mlp.up" of "layers.0"; "embedding" stays, it is its own unit."""
    pieces = key.split(".")
    return ".".join(pieces[2:]) if pieces[0] == "layers" else key


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _stored(checkpointer: ocp.Checkpointer, path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every stored array by array key."""
    stored: dict[str, jax.ShapeDtypeStruct] = {}
    units = sorted((path / PARAMS).iterdir()) if (path / PARAMS).is_dir() else []
    for folder in units:
        with _damage(folder):
            tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
        prefix = folder.name + "." if folder.name.startswith("layers.") else ""
        for key, found in _flatten(tree).items():
            name = prefix + key if unit_of(prefix + key) == folder.name else f"{folder.name}/{key}"  # the second: none of ours
            stored[name] = jax.ShapeDtypeStruct(found.shape, found.dtype)
    return stored


def _check(path: Path, stored: Mapping[str, jax.ShapeDtypeStruct], targets: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    misshapen, wrong = [], []
    for key in targets.keys() & stored.keys():
        found, target = stored[key], targets[key]
        if found.shape != target.shape:
            misshapen.append(f"{key} is {list(found.shape)}, expected {list(target.shape)}")
        scales_or_values = target.dtype == jnp.float8_e4m3fn or key.endswith(".scales")
        allowed = (target.dtype.name,) if scales_or_values else ("bfloat16", "float16", "float32")
        if found.dtype.name not in allowed:
            wrong.append(f"{key} is {found.dtype.name}, expected {' or '.join(allowed)}")
    missing = [key for key in targets if key not in stored]
    extra = [key for key in stored if key not in targets]
    raise_problems(str(path), missing, extra, sorted(misshapen), sorted(wrong))


@contextlib.contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Orbax's and TensorStore's many errors about unreadable files, as one line."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # out of device memory is not the checkpoint's fault
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{folder}: damaged or not a checkpoint of ours ({reason}): convert again") from error
