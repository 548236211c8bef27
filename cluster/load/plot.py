"""Attainment over rate, as a picture. Draws without a display and without matplotlib's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .search import Point, goodput, merge

Curves = Mapping[str, Sequence[Point]]
"""Points of each curve by its label."""

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito: told apart by all


def attainment_plot(path: Path, panels: Mapping[str, Curves], target: float) -> None:
    """Writes a PNG with one panel for each entry: attainment with 95 % intervals, the target, and each
    curve's goodput as a dotted line."""
    figure = Figure(figsize=(1.5 + 4.5 * len(panels), 4.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, curves) in zip(axes, panels.items(), strict=True):
        draw_attainment(panel, curves, target)
        panel.set_title(title, fontsize=10)
    axes[0].set_ylabel("requests that met both objectives, %")
    axes[-1].legend(fontsize=8, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))


def draw_attainment(panel: Axes, curves: Curves, target: float) -> None:
    """One panel of it."""
    for colour, (label, points) in zip(_cycle(len(curves)), curves.items(), strict=True):
        _draw_curve(panel, label, merge(points), colour, target)
    panel.axhline(100 * target, color="0.4", linewidth=0.8, linestyle="--")
    panel.set_xlabel("offered load, requests/s")
    panel.set_ylim(0, 102)
    panel.set_xlim(left=0)
    panel.grid(alpha=0.25)


def _draw_curve(panel: Axes, label: str, points: list[Point], colour: str, target: float) -> None:
    rates = [point.rate for point in points]
    values = [100 * point.attainment for point in points]
    bounds = [point.interval() for point in points]
    errors = [
        [max(0.0, value - 100 * low) for value, (low, _) in zip(values, bounds, strict=True)],
        [max(0.0, 100 * high - value) for value, (_, high) in zip(values, bounds, strict=True)],
    ]
    panel.errorbar(
        rates,
        values,
        yerr=errors,
        color=colour,
        label=label,
        marker="o",
        markersize=4,
        capsize=2,
        linewidth=1.4,
    )
    if points and (found := goodput(points, target)).bracketed:
        panel.axvline(found.rate, color=colour, linewidth=0.8, linestyle=":")


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
