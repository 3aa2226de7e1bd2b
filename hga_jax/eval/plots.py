"""The figures of the evaluations as PNG files. matplotlib is imported here alone, and only when a plot is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def _axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.5, 4.5)) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False, layout="constrained")


def _save(figure: Any, target: str) -> None:
    from matplotlib import pyplot

    figure.savefig(target, dpi=130, format="png")
    pyplot.close(figure)


def plot_nll(report: dict[str, Any], target: str) -> None:
    """Gap to dense by position, one line a policy, with the standard error."""
    figure, axes = _axes()
    ax = axes[0, 0]
    ax.axhline(0, color="black", linewidth=0.8)
    for row in report["policies"][1:]:
        middle = [(part["first"] + part["end"]) / 2 for part in row["by_position"]]
        error = [part["gap_standard_error"] or 0 for part in row["by_position"]]
        ax.errorbar(middle, [part["gap_nats"] for part in row["by_position"]], error, marker="o", capsize=3, label=row["policy"])
    ax.set(xlabel="position", ylabel="loss minus dense loss, nats", title=f"{report['model']}, {report['length']:,} tokens")
    if len(report["policies"]) > 1:
        ax.legend()
    _save(figure, target)


def heat_map(ax: Any, values: np.ndarray, rows: Sequence[Any], columns: Sequence[Any], limits: tuple[float, float], digits: str) -> Any:
    """One heat map with its numbers written in; NaN cells stay blank."""
    image = ax.imshow(values, aspect="auto", vmin=limits[0], vmax=limits[1], cmap="viridis", origin="upper")
    ax.set_xticks(range(len(columns)), [str(item) for item in columns])
    ax.set_yticks(range(len(rows)), [str(item) for item in rows])
    if values.size <= 200:
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                light = value < (limits[0] + limits[1]) / 2
                ax.text(x, y, format(value, digits), ha="center", va="center", fontsize=8, color="white" if light else "black")
    return image
