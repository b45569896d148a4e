"""The report's figures: matplotlib drawings as inline SVG in the page's text colour, so that they suit light and dark.

Each function returns one `<svg>` element as text, with an accessible name.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_curve, roc_curve

# Okabe & Ito's palette, told apart by colour-blind readers, in tones that read on white and on near-black.
COLOURS = ("#2b83ba", "#d9822b", "#2a9d6f", "#c0518f", "#7a6fd0", "#a3883a", "#5aa9c9", "#c9503f")
_INK = "#010203"  # stands for the page's text colour until the SVG is written
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mammopipe",
    "font.size": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def lines(title: str, series: Series, x_label: str, y_label: str, marker: str = "o", width: float = 5.2) -> str:
    """One line a name; `series` is name → (x, y). Values that are missing (None or NaN) are left out."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, x_label, y_label, width)
        for colour, (name, (x, y)) in zip(_cycle(len(series)), series.items(), strict=True):
            points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None and np.isfinite(b)]
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, ms=3.5, lw=1.6, color=colour, label=name)
        if len(series) > 1:
            axes.legend()
        if x_label == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, title)


def roc(title: str, labels: NDArray[np.floating], scores: Mapping[str, NDArray[np.floating]]) -> str:
    """Receiver operating characteristic, a line a set of scores of the same labels."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, "1 - specificity", "sensitivity", 4.2, 3.8)
        axes.plot([0, 1], [0, 1], color=_INK, alpha=0.35, lw=1, ls="--")
        for colour, (name, values) in zip(_cycle(len(scores)), scores.items(), strict=True):
            false_positive, true_positive, _ = roc_curve(labels, values)
            axes.plot(false_positive, true_positive, color=colour, lw=1.8, label=name)
        axes.legend(loc="lower right")
        return _svg(figure, title)


def precision_recall(title: str, labels: NDArray[np.floating], scores: Mapping[str, NDArray[np.floating]]) -> str:
    """Precision over recall; the dashed line is what chance gives."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, "recall", "precision", 4.2, 3.8)
        axes.axhline(float(np.mean(labels)), color=_INK, alpha=0.35, lw=1, ls="--")
        for colour, (name, values) in zip(_cycle(len(scores)), scores.items(), strict=True):
            precision, recall, _ = precision_recall_curve(labels, values)
            axes.plot(recall, precision, color=colour, lw=1.8, label=name)
        axes.set_ylim(-0.02, 1.02)
        axes.legend(loc="upper right")
        return _svg(figure, title)


def calibration(title: str, labels: NDArray[np.floating], scores: NDArray[np.floating], bins: int = 8) -> str:
    """Share of positives over the mean prediction, in bins of equal counts; the dashed line is perfect."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, "mean prediction", "share with cancer", 4.2, 3.8)
        axes.plot([0, 1], [0, 1], color=_INK, alpha=0.35, lw=1, ls="--")
        share, mean = calibration_curve(labels, np.clip(scores, 0, 1), n_bins=bins, strategy="quantile")
        axes.plot(mean, share, marker="o", ms=4, lw=1.6, color=COLOURS[0])
        return _svg(figure, title)


def stacked_bars(title: str, parts: Mapping[str, Mapping[str, float]], y_label: str) -> str:
    """Bars of stacked parts; `parts` is bar → part → height."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, "", y_label, max(4.2, 0.55 * len(parts) + 1.5))
        names = list(parts)
        bottom = np.zeros(len(names))
        kinds = list(dict.fromkeys(kind for bar in parts.values() for kind in bar))
        for colour, kind in zip(_cycle(len(kinds)), kinds, strict=True):
            heights = np.array([float(parts[name].get(kind, 0)) for name in names])
            axes.bar(names, heights, bottom=bottom, color=colour, width=0.7, label=kind)
            bottom += heights
        axes.grid(axis="x", visible=False)
        if len(names) > 6 or max(map(len, names), default=0) > 8:
            axes.tick_params(axis="x", rotation=40)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return _svg(figure, title)


def histogram(title: str, labels: NDArray[np.floating], scores: NDArray[np.floating]) -> str:
    """How the predictions of both classes are spread."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, "prediction", "share of the class", 4.2, 3.8)
        bins = np.linspace(0, 1, 26).tolist()
        for value, name in ((0, "without cancer"), (1, "with cancer")):
            chosen = scores[labels == value]
            if chosen.size:
                weights = np.full(chosen.size, 1 / chosen.size)
                axes.hist(chosen, bins=bins, weights=weights, color=COLOURS[value], alpha=0.6, label=name)
        axes.legend()
        return _svg(figure, title)


def _axes(title: str, x_label: str, y_label: str, width: float, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _svg(figure: Figure, name: str) -> str:
    out = io.StringIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(out, format="svg", metadata=metadata)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(name)}" ', 1)
