"""Which attention an evaluation compares: `--policy` words such as dense, sketch or paper:top_chunks=20,top_groups=32. No JAX here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from hga_jax.config import POLICIES, HGAConfig, parse_threshold

NAMES = ("dense", *POLICIES, "windows")
CHOOSABLE = tuple(f.name for f in fields(HGAConfig) if f.name != "policy")


@dataclass(frozen=True)
class Choice:
    """One attention to evaluate. hga: its settings; None: dense."""

    name: str
    hga: HGAConfig | None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that matter to this choice, for reports."""
        if self.hga is None:
            return {}
        sketch, paper = (
            ("threshold", "votes", "vote_share", "vote_stride", "sketch_pairs", "page_capacity"),
            ("top_chunks", "top_groups", "summary"),
        )
        other = sketch if self.hga.policy == "paper" else paper
        return {f.name: getattr(self.hga, f.name) for f in fields(self.hga) if f.name not in other}


DENSE = Choice("dense", None)


def parse_choices(words: Sequence[str], common: Mapping[str, Any] | None = None) -> list[Choice]:
    """Choices from --policy words; `common` holds the settings given as flags, which a word's own settings override.

    "windows" is the sinks and the local window alone, nothing routed. A word may be given twice with different settings.
    Raises ValueError naming what is not known.
    """
    common = {key: value for key, value in (common or {}).items() if value is not None}
    choices: list[Choice] = []
    for word in words:
        name, _, listed = word.partition(":")
        if name not in NAMES:
            raise ValueError(f"--policy {word}: {name!r} is not known, choose {', '.join(NAMES)}")
        own = dict(_setting(word, item) for item in listed.split(",") if item)
        if name == "dense":
            if own:
                raise ValueError(f"--policy {word}: dense has no settings")
            choice = DENSE
        elif name == "windows":
            # No share of a softmax reaches this threshold unless it is all of it, so nothing is opened.
            choice = Choice(word, replace(HGAConfig(policy="sketch"), **(common | own | {"threshold": 1 - 1e-9, "votes": 0})))
        else:
            choice = Choice(word, replace(HGAConfig(policy=name), **(common | own)))
        if choice not in choices:
            choices.append(choice)
    return choices


def with_dense(choices: list[Choice]) -> list[Choice]:
    """The choices with dense first: it is what the others are compared with."""
    return [DENSE, *(choice for choice in choices if choice != DENSE)]


def _setting(word: str, item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if key not in CHOOSABLE or not equals:
        raise ValueError(f"--policy {word}: {item!r} is no setting, write NAME=VALUE with NAME one of {', '.join(CHOOSABLE)}")
    if key == "threshold":
        return key, parse_threshold(text)
    if text == "auto":
        return key, text
    kind = type(getattr(HGAConfig(), key))
    kind = int if getattr(HGAConfig(), key) == "auto" else kind
    try:
        return key, kind(text)
    except ValueError:
        raise ValueError(f"--policy {word}: {key} needs {'a number' if kind is float else 'a whole number'}, not {text!r}") from None
