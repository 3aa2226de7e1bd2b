"""Registering frozen dataclasses as pytrees, and what loops over pytrees need inside shard_map."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def register[Class: type](cls: Class) -> Class:
    """Like jax.tree_util.register_dataclass, but JAX rebuilds instances without calling __init__.

    So the shapes in the annotations are checked where our code makes an instance, and not where a transformation fills one with batched
    arrays, shapes or placeholders. Fields with metadata {"static": True} are settings: hashable, compared, no leaves.
    """
    names = tuple(field.name for field in fields(cls) if not field.metadata.get("static"))
    settings = tuple(field.name for field in fields(cls) if field.metadata.get("static"))

    def flatten_with_keys(instance: Any) -> tuple:
        return tuple((jax.tree_util.GetAttrKey(name), getattr(instance, name)) for name in names), aux(instance)

    def flatten(instance: Any) -> tuple:
        return tuple(getattr(instance, name) for name in names), aux(instance)

    def aux(instance: Any) -> tuple:
        return tuple(getattr(instance, name) for name in settings)

    def unflatten(static: tuple, children: Any) -> Any:
        instance = object.__new__(cls)
        for name, value in (*zip(names, children, strict=True), *zip(settings, static, strict=True)):
            object.__setattr__(instance, name, value)
        return instance

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def varying_like(tree: Any, reference: Array) -> Any:
    """The same values, typed inside shard_map as different on each device of the mesh axes over which `reference` is.

    A loop's carry must enter with the type it leaves with, and constants are born the same everywhere. Elsewhere this does nothing.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    return jax.tree.map(lambda leaf: leaf + jnp.zeros_like(reference, shape=(), dtype=leaf.dtype), tree)
