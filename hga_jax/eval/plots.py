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


def plot_sweep(report: dict[str, Any], target: str) -> None:
    """Gap against fetched tokens, a line a policy, its settings written beside the points."""
    figure, axes = _axes()
    ax = axes[0, 0]
    ax.axhline(0, color="black", linewidth=0.8)
    for kind in dict.fromkeys(point["policy"].partition(":")[0] for point in report["points"]):
        points = [point for point in report["points"] if point["policy"].partition(":")[0] == kind]
        x, y = [point["fetched_tokens"] for point in points], [point["gap_nats"] for point in points]
        ax.errorbar(x, y, [point["gap_standard_error"] or 0 for point in points], marker="o", capsize=3, label=kind)
        for point in points:
            values = "/".join(item.partition("=")[2] for item in point["policy"].partition(":")[2].split(","))
            ax.annotate(values, (point["fetched_tokens"], point["gap_nats"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    title = f"{report['model']}, {report['length']:,} tokens"
    ax.set(xlabel="tokens fetched per kv head and query block", ylabel="loss minus dense loss, nats", title=title)
    ax.legend()
    _save(figure, target)


def plot_mass(report: dict[str, Any], target: str) -> None:
    """Missed mass, layers down and heads across, one map a policy on one scale."""
    figure, axes = _axes(1, len(report["policies"]), (5.0, 6.0))
    maps = [np.array(policy["missed"]) for policy in report["policies"]]
    top = max(float(values.max()) for values in maps) or 1.0
    for ax, policy, values in zip(axes[0], report["policies"], maps, strict=True):
        image = heat_map(ax, values, range(values.shape[0]), range(values.shape[1]), (0.0, top), ".2f")
        ax.set(xlabel="query head", ylabel="layer", title=f"{policy['policy']}: {values.mean():.2%} missed")
        ax.tick_params(labelsize=7)
    figure.colorbar(image, ax=axes[0].tolist(), label="attention mass on closed pages")
    _save(figure, target)


def plot_needle(report: dict[str, Any], target: str) -> None:
    """Share found, depths down and lengths across, one map an attention."""
    cells = report["cells"]
    lengths, depths = (sorted({cell[key] for cell in cells}) for key in ("length", "depth"))
    names = list(dict.fromkeys(cell["attention"] for cell in cells))
    figure, axes = _axes(1, len(names), (5.0, 4.0))
    for ax, name in zip(axes[0], names, strict=True):
        values = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            if cell["attention"] == name:
                values[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["correct"] / cell["total"]
        image = heat_map(ax, values, [f"{depth:.0%}" for depth in depths], [f"{length:,}" for length in lengths], (0.0, 1.0), ".0%")
        ax.set(xlabel="tokens", ylabel="depth", title=f"{name}: {np.nanmean(values):.0%} found")
    figure.colorbar(image, ax=axes[0].tolist(), label="share found")
    _save(figure, target)


def plot_ruler(report: dict[str, Any], target: str) -> None:
    """Scores, families down and lengths across, one map an attention."""
    cells = report["cells"]
    lengths = sorted({cell["length"] for cell in cells})
    families, names = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("family", "attention"))
    figure, axes = _axes(1, len(names), (5.5, 4.0))
    for ax, name in zip(axes[0], names, strict=True):
        values = np.full((len(families), len(lengths)), np.nan)
        for cell in cells:
            if cell["attention"] == name:
                values[families.index(cell["family"]), lengths.index(cell["length"])] = cell["score"]
        image = heat_map(ax, values, families, [f"{length:,}" for length in lengths], (0.0, 1.0), ".0%")
        ax.set(xlabel="tokens", title=f"{name}: {np.nanmean(values):.1%}")
    figure.colorbar(image, ax=axes[0].tolist(), label="score")
    _save(figure, target)
