"""What is wrong with a checkpoint, all of it at once, before a byte of weights is copied."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping

import jax

from convert.mapping import SCALE_SUFFIX, split_key
from convert.sources import Source
from hga_jax.model import Decoder, weight_leaves
from hga_jax.quantized import BlockScaled


def array_targets(decoder: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract decoder as plain arrays: an FP8 leaf becomes `<path>.values` and `<path>.scales`."""
    targets: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in weight_leaves(decoder).items():
        if isinstance(leaf, BlockScaled):
            targets[path + ".values"], targets[path + ".scales"] = leaf.values, leaf.scales
        else:
            targets[path] = leaf
    return targets


def check_source(source: Source, targets: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises one ValueError that names every missing, unexpected, misshapen and wrong-dtype tensor."""
    missing, misshapen, wrong, wanted = [], [], [], set()
    for key, target in targets.items():
        piece = split_key(key)[1]
        for part in source.parts(key):
            wanted.add(part.name)
            found = source.tensors.get(part.name)
            if found is None:
                missing.append(part.name)
                continue
            shape = target.shape if part.expert is None else target.shape[1:]
            if found.shape != shape:
                misshapen.append(f"{part.name} is {list(found.shape)}, expected {list(shape)}")
            if piece == "values" and found.kind != "fp8":
                wrong.append(f"{part.name} is {found.label}, expected F8_E4M3 (or its module in modules_to_not_convert)")
            elif piece != "values" and found.kind == "fp8":
                scaled = part.name + SCALE_SUFFIX in source.tensors
                reason = "that config.json announces no such quantisation for" if scaled else f"without {part.name + SCALE_SUFFIX}"
                wrong.append(f"{part.name} is {found.label} {reason}, expected BF16, F16 or F32")
            elif piece != "values" and found.kind != "float":
                wrong.append(f"{part.name} is {found.label}, expected BF16, F16 or F32")
    extra = [name for name in source.tensors if name not in wanted and not source.is_harmless(name)]
    raise_problems(str(source.path), missing, extra, misshapen, wrong)


def raise_problems(where: str, missing: list[str], extra: list[str], misshapen: list[str], wrong: list[str]) -> None:
    """One ValueError of all the problems; nothing when there are none."""
    problems = []
    for what, names in (("missing", missing), ("unexpected", extra)):
        if names:
            problems.append(f"{len(names)} {what}: {', '.join(compact(names))}")
    for what, sentences in (("misshapen", misshapen), ("of wrong dtype", wrong)):
        if sentences:
            problems.append(f"{len(sentences)} {what}: {', '.join(sentences)}")
    if problems:
        raise ValueError(f"{where}: the tensors do not fit the model its config describes: {'; '.join(problems)}")


def compact(names: Iterable[str]) -> list[str]:
    """The same names, shorter: those that differ in numbers alone and cover every combination become one, e.g. "layers.{0-3}.mlp.up"."""
    families: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        numbers = tuple(int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", name))
        families.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "{}", name), []).append(numbers)
    short = []
    for family, numbers in families.items():
        axes = [sorted(set(axis)) for axis in zip(*numbers, strict=True)]
        if len(numbers) > 1 and set(itertools.product(*axes)) == set(numbers):
            short.append(family.format(*(_ranges(axis) for axis in axes)))
        else:
            short += [family.format(*item) for item in sorted(numbers)]
    return short


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
