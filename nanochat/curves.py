"""Curves of a training run: its metrics.jsonl drawn as small charts, one a metric, in an SVG file.

    draw_curves("base_checkpoints/d20/metrics.jsonl", "report/report_base_train.svg", title="Base model: training")

A line of metrics.jsonl is a JSON object with "step" and whatever was measured at it. matplotlib is used without pyplot:
no backend, no global state, no display. What this does not do: smooth. The curves show what was logged.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.common import atomic_write


class Panel(NamedTuple):
    """One small chart: its key in metrics.jsonl, its title and its looks."""

    key: str
    title: str
    color: str
    has_points: bool = False  # measured now and then, not at every step
    from_zero: bool = False  # read against zero


PANELS = (
    Panel("loss", "Training loss (nats per token)", "#2563a8"),
    Panel("val_bpb", "Validation bits per byte", "#b4451f", has_points=True),
    Panel("core_metric", "CORE", "#6d3f9c", has_points=True),
    Panel("reward", "Reward (share of samples that are right)", "#6d3f9c"),
    Panel("pass@1", "pass@1 on test problems", "#b4451f", has_points=True),
    Panel("sample_tokens", "Tokens per sample", "#2563a8"),
    Panel("lr_multiplier", "Learning-rate multiplier", "#4a7c2c", from_zero=True),
    Panel("tokens_per_second", "Tokens per second", "#7a6a1f", from_zero=True),
)
MAX_POINTS = 1000  # a curve; more cannot be told apart on paper


def read_metrics(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.jsonl as key -> [(step, value)], by step. Where a resumed run logged a step again, the later line wins.

    A line that was cut short by a crash is passed over. Empty where there is no file.
    """
    curves: dict[str, dict[int, float]] = {}
    for step, metrics in _metric_lines(Path(path)):
        for key, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                curves.setdefault(key, {})[step] = value
    return {key: sorted(points.items()) for key, points in curves.items()}


def _metric_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, the other entries) of each whole line."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as f:
        for line in f:
            try:
                metrics = json.loads(line)
                yield int(metrics.pop("step")), metrics
            except (ValueError, KeyError, TypeError, AttributeError):
                continue


def draw_curves(metrics_path: str | Path, svg_path: str | Path, title: str = "") -> Path | None:
    """Draw what a training run measured, a small chart a metric over the step, as SVG; return its path.

    None, and no file, where metrics_path holds no metric that PANELS knows.
    """
    curves = read_metrics(metrics_path)
    panels = [panel for panel in PANELS if curves.get(panel.key)]
    if not panels:
        return None
    import matplotlib  # slow to import, and only needed here
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    num_columns = min(2, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    last_step = max(curves[panel.key][-1][0] for panel in panels)
    with matplotlib.rc_context({"svg.hashsalt": "nanochat", "font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(4.6 * num_columns, 2.5 * num_rows + 0.4), layout="constrained")
        figure.suptitle(title, fontsize=12, fontweight="bold")
        axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
        for ax, panel in zip(axes, panels, strict=False):
            steps, values = zip(*_thin(curves[panel.key]), strict=True)
            marker = "o" if panel.has_points or len(steps) == 1 else None
            ax.plot(steps, values, color=panel.color, linewidth=1.4, marker=marker, markersize=3.5)
            ax.set_title(panel.title, loc="left")
            ax.set_xlim(0, last_step * 1.02)
            _frame(ax, panel, values)
            ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
            if panel.key == "tokens_per_second":
                ax.yaxis.set_major_formatter(FuncFormatter(lambda speed, _: f"{speed:,.0f}"))
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        for ax in axes[max(0, len(panels) - num_columns) : len(panels)]:
            ax.set_xlabel("step")
        with atomic_write(svg_path) as f:
            figure.savefig(f, format="svg", metadata={"Date": None}, facecolor="white")
    return Path(svg_path)


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about MAX_POINTS of the points, evenly spread, the last one among them."""
    stride = math.ceil(len(points) / MAX_POINTS)
    return points[::-stride][::-1]


def _frame(ax: Any, panel: Panel, values: tuple[float, ...]) -> None:
    """Light grid, no box; the axes of quantities that are read against zero begin there."""
    ax.grid(True, color="#e4e4e4", linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if panel.from_zero:
        ax.set_ylim(0, max(values) * 1.08 or 1.0)
