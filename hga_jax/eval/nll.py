"""`eval nll`: mean loss of dense attention and of any policies on the same tokens, and the gap between them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hga_jax.backend import Stats
from hga_jax.eval.choices import Choice
from hga_jax.eval.losses import Scored, paired_gap, position_bins, score
from hga_jax.eval.reporting import Progress, table
from hga_jax.language_model import LanguageModel

BINS = 8


@dataclass(frozen=True)
class Document:
    """The first tokens of one text."""

    name: str
    tokens: Int[np.ndarray, " T"]

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids as little-endian int32: whether two runs saw the same tokens."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()


def documents(model: LanguageModel, texts: dict[str, str], length: int) -> list[Document]:
    """The first `length` tokens of each text, without special tokens. Raises ValueError when a text is too short."""
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer: texts cannot be turned into tokens")
    made = []
    for name, text in texts.items():
        # Few tokens are longer than 16 characters: a long text need not be tokenised to its end. The cut may change the last tokens.
        tokens = model.tokenizer.encode(text[: 16 * length])
        if len(tokens) < length + 64 and len(text) > 16 * length:
            tokens = model.tokenizer.encode(text)
        if len(tokens) < length:
            raise ValueError(f"{name} has {len(tokens)} tokens, fewer than --length {length}: lower --length or give a longer text")
        made.append(Document(name, tokens[:length]))
    return made


def measure(model: LanguageModel, texts: Sequence[Document], choices: Sequence[Choice], name: str = "nll") -> dict[str, list[Scored]]:
    """Scores by choice name, one a document, document by document."""
    scored: dict[str, list[Scored]] = {choice.name: [] for choice in choices}
    layers = len(model.params.layers)
    with Progress(sum(len(text.tokens) for text in texts) * len(choices), name) as bar:
        for text in texts:
            for choice in choices:
                backend = model.backend("dense") if choice.hga is None else model.backend("hga", choice.hga)
                bar.note(f"{choice.name}, {text.name}, {layers} layers")
                result = score(model, text.tokens, backend, partial(bar.within, bar.done))
                bar.finish(len(text.tokens))
                scored[choice.name].append(result)
    return scored


def summary(scored: Sequence[Scored], dense: Sequence[Scored], skip: int) -> dict[str, Any]:
    """The figures of one choice over some documents."""
    nats = np.concatenate([item.nats[skip:] for item in scored])
    gap, error = paired_gap([item.nats[skip:] - base.nats[skip:] for item, base in zip(scored, dense, strict=True)])
    stats = sum((item.stats for item in scored), start=Stats.zero())
    return {
        "nats": float(nats.mean(dtype=np.float64)), "gap_nats": gap, "gap_standard_error": error,
        **stats_figures(stats),
        "seconds": sum(item.seconds for item in scored), "compile_seconds": sum(item.compile_seconds for item in scored),
    }  # fmt: skip


def stats_figures(stats: Stats) -> dict[str, float]:
    """Fractions and means out of summed stats."""
    queries, blocks = max(float(stats.queries), 1.0), max(float(stats.blocks), 1.0)
    return {
        "attended_fraction": float(stats.attended) / queries, "fetched_fraction": float(stats.fetched) / blocks,
        "fetched_tokens": float(stats.fetched_tokens) / blocks, "unopened_mass": float(stats.unopened) / queries,
        "refused_requests": float(stats.refused),
    }  # fmt: skip


def by_position(scored: Sequence[Scored], dense: Sequence[Scored], skip: int) -> list[dict[str, Any]]:
    """Loss and gap over equal stretches of positions; `first` and `end` are positions of the predicted tokens."""
    length, rows = len(dense[0].nats) + 1, []
    for first, end in position_bins(skip, length, BINS):
        part: list[Float[np.ndarray, " _"]] = [item.nats[first - 1 : end - 1] for item in scored]
        gap, error = paired_gap([a - item.nats[first - 1 : end - 1] for a, item in zip(part, dense, strict=True)])
        nats = float(np.concatenate(part).mean(dtype=np.float64))
        rows.append({"first": first, "end": end, "nats": nats, "gap_nats": gap, "gap_standard_error": error})
    return rows


def evaluate(model: LanguageModel, texts: dict[str, str], length: int, choices: Sequence[Choice], skip: int) -> dict[str, Any]:
    """The report of `eval nll` as a JSON-ready dict. choices: dense among them, first."""
    parts = documents(model, texts, length)
    scored = measure(model, parts, choices)
    dense = scored["dense"]
    report = [
        {"policy": choice.name, "settings": choice.settings, **summary(scored[choice.name], dense, skip),
         "by_position": by_position(scored[choice.name], dense, skip)}
        for choice in choices
    ]  # fmt: skip
    each = [
        {"text": part.name, "tokens": length, "tokens_sha256": part.digest,
         "policies": [{"policy": name, **summary([items[i]], [dense[i]], skip)} for name, items in scored.items()]}
        for i, part in enumerate(parts)
    ]  # fmt: skip
    main = report[1] if len(report) > 1 else report[0]
    return {
        "model": model.name, "length": length, "tokens_scored": len(parts) * (length - 1 - skip), "skip": skip,
        "dense_nats": report[0]["nats"], "hga_nats": main["nats"], "gap_nats": main["gap_nats"],
        "gap_standard_error": main["gap_standard_error"], "attended_fraction": main["attended_fraction"],
        "fetched_fraction": main["fetched_fraction"], "fetched_tokens": main["fetched_tokens"], "dtype": str(np.dtype(model.dtype)),
        "policies": report, "documents": each,
    }  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """The report as tables."""
    head = (
        f"{report['model']}, {report['dtype']}, {report['length']:,} tokens of {len(report['documents'])} text(s), "
        f"{report['tokens_scored']:,} predictions scored (positions > {report['skip']:,})\n"
        f"gap: mean of loss minus dense loss, +- its standard error over blocks of 64 tokens; fetched: tokens per kv head and query block"
    )
    columns = ("policy", "nats", "gap", "+-", "attended", "fetched", "fetched tokens", "refused", "seconds")
    blocks = [head, table(columns, [_row(row["policy"], row) for row in report["policies"]])]
    if len(report["documents"]) > 1:
        rows = [_row(f"{text['text']}: {row['policy']}", row) for text in report["documents"] for row in text["policies"]]
        blocks.append(table(("text: policy", *columns[1:]), rows))
    positions = [f"{row['first']:,}-{row['end'] - 1:,}" for row in report["policies"][0]["by_position"]]
    rows = [[row["policy"], *(_nats(row, part) for part in row["by_position"])] for row in report["policies"]]
    blocks.append(table(("by position", *positions), rows))
    return "\n\n".join(blocks)


def _row(name: str, row: dict[str, Any]) -> list[Any]:
    dense = row["policy"] == "dense"
    gap = None if dense else f"{row['gap_nats']:+.4f}"
    error = None if dense or row["gap_standard_error"] is None else f"{row['gap_standard_error']:.4f}"
    return [
        name, f"{row['nats']:.4f}", gap, error, f"{row['attended_fraction']:.1%}", f"{row['fetched_fraction']:.1%}",
        f"{row['fetched_tokens']:,.0f}", f"{row['refused_requests']:,.0f}", f"{row['seconds']:.1f}",
    ]  # fmt: skip


def _nats(row: dict[str, Any], part: dict[str, Any]) -> str:
    return f"{part['nats']:.3f}" if row["policy"] == "dense" else f"{part['gap_nats']:+.4f}"
