"""`eval sweep`: thresholds of the sketch policy and budgets of the paper policy against the loss gap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hga_jax.eval.reporting import table


def sweep_words(thresholds: Sequence[str], budgets: Sequence[str]) -> list[str]:
    """--policy words for thresholds ("0.004") and budgets ("16/64": chunks and groups). Raises ValueError."""
    words = [f"sketch:threshold={threshold}" for threshold in thresholds]
    for budget in budgets:
        chunks, slash, groups = budget.partition("/")
        if not (slash and chunks.isdigit() and groups.isdigit()):
            raise ValueError(f"--budgets {budget}: write CHUNKS/GROUPS, as in 16/64")
        words.append(f"paper:top_chunks={chunks},top_groups={groups}")
    if not words:
        raise ValueError("nothing to sweep: give --thresholds or --budgets")
    return words


def pareto(points: Sequence[dict[str, Any]]) -> list[bool]:
    """Which points no other beats or equals in both the gap and the fetched tokens."""

    def beaten(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return b is not a and b["gap_nats"] <= a["gap_nats"] and b["fetched_tokens"] <= a["fetched_tokens"]

    return [not any(beaten(a, b) for b in points) for a in points]


def add_points(report: dict[str, Any]) -> dict[str, Any]:
    """The nll report with `points`: one a policy, by fetched tokens, each saying whether it is on the Pareto front."""
    keys = ("policy", "gap_nats", "gap_standard_error", "fetched_tokens", "fetched_fraction", "attended_fraction", "seconds")
    points = [{key: row[key] for key in keys} for row in report["policies"] if row["policy"] != "dense"]
    points.sort(key=lambda point: point["fetched_tokens"])
    return report | {"points": [point | {"pareto": front} for point, front in zip(points, pareto(points), strict=True)]}


def as_text(report: dict[str, Any]) -> str:
    """The points as a table; * marks the front."""
    head = (
        f"{report['model']}, {report['dtype']}, {report['length']:,} tokens of {len(report['documents'])} text(s), dense "
        f"{report['dense_nats']:.4f} nats over positions > {report['skip']:,}; * no other setting is better in both gap and fetched tokens"
    )
    rows = [
        [point["policy"] + (" *" if point["pareto"] else ""), f"{point['fetched_tokens']:,.0f}", f"{point['attended_fraction']:.1%}",
         f"{point['gap_nats']:+.4f}", f"{point['gap_standard_error'] or 0:.4f}", f"{point['seconds']:.1f}"]
        for point in report["points"]
    ]  # fmt: skip
    return head + "\n\n" + table(("setting", "fetched tokens", "attended", "gap", "+-", "seconds"), rows)
