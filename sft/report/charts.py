"""Charts of a run's log: the loss curve as a PNG, and the layout of the run page's curves."""

import math
from collections.abc import Sequence
from pathlib import Path

CHART = {"width": 640, "height": 220, "left": 64, "bottom": 196, "top": 10, "right": 616}  # in SVG units
MAX_POINTS = 1000  # of a line in a chart


def plot_losses(log_history: list[dict], path: Path) -> None:
    """Draw training and held-out loss over the steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for key, label, marker in (("loss", "training", ""), ("eval_loss", "held out", "o")):
        points = points_of(log_history, key)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, format="png")
    pyplot.close(figure)


def points_of(log_history: list[dict], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of every log entry that has `key`."""
    return [(entry["step"], entry[key]) for entry in log_history if key in entry]


def lay_out_chart(
    line: Sequence[tuple], dots: Sequence[tuple] = (), *more: Sequence[tuple], low: float = math.inf
) -> dict | None:
    """Lay out a line, a line with dots and more lines over common axes, in units of CHART; None without a finite point.

    Points are (step, value); the axis of the values goes down to `low` at least.
    """
    series = [[(x, y) for x, y in points if math.isfinite(y)] for points in (line, dots, *more)]
    if not any(series):
        return None
    xs, ys = zip(*(point for points in series for point in points), strict=True)
    (x0, x1) = _widen_range(min(xs), max(xs))
    (y0, y1) = _widen_range(min(*ys, low), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = CHART["left"] + (x - x0) / (x1 - x0) * (CHART["right"] - CHART["left"])
        return round(across, 1), round(CHART["bottom"] - (y - y0) / (y1 - y0) * (CHART["bottom"] - CHART["top"]), 1)

    lines = [points[:: max(1, len(points) // MAX_POINTS)] + points[-1:] for points in series]
    return {
        **CHART,
        "lines": [" ".join("{},{}".format(*place(*point)) for point in points) for points in lines],
        "dots": [(*place(x, y), f"{y:.4g}", x) for x, y in series[1]],
        "across": [(place(x, y0)[0], f"{x:,.6g}") for x in choose_ticks(x0, x1) if x == int(x)],
        "up": [(place(x0, y)[1], f"{y:,.6g}") for y in choose_ticks(y0, y1)],
    }


def _widen_range(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def choose_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between two: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= (high - low) / 5)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
