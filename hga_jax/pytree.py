"""Registering frozen dataclasses as pytrees."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import jax


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
