"""A foreign checkpoint into our own format, a layer at a time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import checkpoint
from convert.checking import array_targets, check_source
from convert.load import Progress, check_dtype, open_source, read_tokenizer
from convert.stream import make_units, stream_arrays
from hga_jax.model import Decoder

# What transformers writes beside the weights and a tokenizer is made of; files that are absent are skipped.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def convert_checkpoint(
    source_path: str | os.PathLike[str],
    target_path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint at source_path as an Orbax checkpoint directory that load_decoder opens. Returns the directory.

    dtype: of the weights that are not FP8 (those stay FP8); None keeps the source's. overwrite replaces an earlier conversion only.
    Everything is written beside the target and renamed at the end: a conversion that dies leaves no checkpoint behind. Raises ValueError,
    one line, before anything is written when the source is damaged or does not fit its config, or the target exists or has no room.
    """
    source_path, target = Path(source_path), Path(target_path).absolute()
    if target.exists() and not overwrite:
        raise ValueError(f"{target_path}: exists already: choose another name or pass --overwrite")
    if target.exists() and not checkpoint.is_converted(target):
        raise ValueError(f"{target_path}: exists and is no converted checkpoint: --overwrite replaces those only")
    if checkpoint.is_converted(source_path):
        raise ValueError(f"{source_path}: is a converted checkpoint already")
    source = open_source(source_path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        dtype = check_dtype(source.dtype if dtype is None else dtype)
        targets = array_targets(Decoder.abstract(source.config, dtype))
        check_source(source, targets)
        tokenizer = None if source_path.is_dir() else read_tokenizer(source_path)
        _check_room(target, sum(item.size * item.dtype.itemsize for item in targets.values()))
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        host = jax.local_devices(backend="cpu")[0]

        def put(key: str, array: np.ndarray) -> tuple[jax.Array, bool]:
            return jax.device_put(array, host), False

        checkpoint.save_units(partial, stream_arrays(source, make_units(source, targets), put, progress))
        if tokenizer is not None:
            tokenizer.save(partial)
        elif source_path.is_dir():
            _copy_tokenizer(source_path, partial)
        checkpoint.write_settings(partial, checkpoint.Settings(source.config, jnp.dtype(dtype), source.raw))
        _swap_in(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        source.close()
    return target


def _check_room(target: Path, nbytes: int) -> None:
    parent = next(folder for folder in target.parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < nbytes:
        raise ValueError(f"{parent}: has {free / 1e9:.1f} GB free, the checkpoint needs {nbytes / 1e9:.1f} GB")


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _swap_in(partial: Path, target: Path) -> None:
    """Put the finished directory in the target's place; an earlier conversion is deleted only after that."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)
