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
from matplotlib.patches import Rectangle
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
Curves = Mapping[str, tuple[NDArray[np.floating], NDArray[np.floating]]]
Band = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def lines(
    title: str, series: Series, x_label: str, y_label: str, marker: str = "o", width: float = 4.6, height: float = 3.2
) -> str:
    """One line a name; `series` is name → (x, y). Values that are missing (None or NaN) are left out."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, x_label, y_label, width, height)
        for colour, (name, (x, y)) in zip(_cycle(len(series)), series.items(), strict=True):
            points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None and np.isfinite(b)]
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, ms=3.5, lw=1.6, color=colour, label=name)
        if len(series) > 1:
            # Searching for the best place takes a second for long time lines.
            figure.legend(loc="outside lower center", ncols=min(len(series), 4))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useOffset=False)
        if x_label == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        return _svg(figure, title)


def roc(title: str, curves: Curves, band: Band | None = None) -> str:
    """Receiver operating characteristic; `curves` is name → (labels, scores)."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, "1 - specificity", "sensitivity", 4.2, 3.8)
        axes.plot([0, 1], [0, 1], color=_INK, alpha=0.35, lw=1, ls="--")
        if band is not None:
            axes.fill_between(*band, color=COLOURS[0], alpha=0.18, lw=0, label="95 % interval")
        for colour, (name, (labels, scores)) in zip(_cycle(len(curves)), curves.items(), strict=True):
            false_positive, true_positive, _ = roc_curve(labels, scores)
            axes.plot(false_positive, true_positive, color=colour, lw=1.8, label=name)
        axes.legend(loc="lower right")
        return _svg(figure, title)


def precision_recall(title: str, curves: Curves, band: Band | None = None) -> str:
    """Precision over recall; the dashed line is what chance gives in the first set."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, "recall", "precision", 4.2, 3.8)
        chance = float(np.mean(next(iter(curves.values()))[0]))
        axes.axhline(chance, color=_INK, alpha=0.35, lw=1, ls="--")
        if band is not None:
            axes.fill_between(*band, color=COLOURS[0], alpha=0.18, lw=0, label="95 % interval")
        for colour, (name, (labels, scores)) in zip(_cycle(len(curves)), curves.items(), strict=True):
            precision, recall, _ = precision_recall_curve(labels, scores)
            axes.plot(recall, precision, color=colour, lw=1.8, label=name)
        axes.set_ylim(-0.02, 1.02)
        axes.legend(loc="lower left")
        return _svg(figure, title)


def bands(
    labels: NDArray[np.floating], scores: NDArray[np.floating], groups: NDArray[Any], resamples: int = 200
) -> tuple[Band, Band]:
    """Pointwise 95 % bands of ROC and precision over recall, resampling whole groups (patients) with replacement.

    Returns:
        For each, (x, low, high), float64 [101].
    """
    generator = np.random.default_rng(0)
    names, codes = np.unique(groups, return_inverse=True)
    grid = np.linspace(0, 1, 101)
    found_roc, found_pr = [], []
    for _ in range(resamples):
        weights = np.bincount(generator.integers(0, len(names), len(names)), minlength=len(names))[codes]
        kept = weights > 0
        if not 0 < labels[kept].sum() < kept.sum():
            continue
        false_positive, true_positive, _ = roc_curve(labels[kept], scores[kept], sample_weight=weights[kept])
        precision, recall, _ = precision_recall_curve(labels[kept], scores[kept], sample_weight=weights[kept])
        found_roc.append(np.interp(grid, false_positive, true_positive))
        found_pr.append(np.interp(grid, recall[::-1], precision[::-1]))
    roc_ends = np.percentile(found_roc or [np.full(101, np.nan)], [2.5, 97.5], axis=0)
    pr_ends = np.percentile(found_pr or [np.full(101, np.nan)], [2.5, 97.5], axis=0)
    return (grid, roc_ends[0], roc_ends[1]), (grid, pr_ends[0], pr_ends[1])


def confusion(title: str, counts: NDArray[np.integer]) -> str:
    """Counts [truth, called], each 0 for no cancer; shaded by the share of its row."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, "called", "truth", 4.2, 3.8)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        for row in range(2):
            for column in range(2):
                colour = COLOURS[0] if row == column else COLOURS[1]
                place = (column - 0.5, row - 0.5)
                axes.add_patch(Rectangle(place, 1, 1, color=colour, alpha=0.1 + 0.45 * share[row, column], lw=0))
                text = f"{counts[row, column]:,}\n{share[row, column]:.0%}"
                axes.text(column, row, text, ha="center", va="center", fontsize=13)
        axes.set_xlim(-0.5, 1.5)
        axes.set_ylim(1.5, -0.5)
        axes.set_xticks([0, 1], ["healthy", "suspicious"])
        axes.set_yticks([0, 1], ["no cancer", "cancer"], rotation=90, va="center")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        return _svg(figure, title)


def intervals(title: str, values: Mapping[str, tuple[float, float, float]], x_label: str) -> str:
    """One point a name with its interval; `values` is name → (value, low, high)."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, x_label, "", 4.2, max(3.8, 0.26 * len(values) + 1.2))
        for place, (value, low, high) in enumerate(values.values()):
            axes.plot([low, high], [place, place], color=COLOURS[0], lw=2, alpha=0.5)
            axes.plot([value], [place], marker="o", ms=5, color=COLOURS[0])
        axes.axvline(0.5, color=_INK, alpha=0.35, lw=1, ls="--")
        axes.set_yticks(range(len(values)), [_short(name) for name in values])
        axes.invert_yaxis()
        return _svg(figure, title)


def calibration(title: str, labels: NDArray[np.floating], scores: NDArray[np.floating], bins: int = 8) -> str:
    """Share of positives over the mean prediction, in bins of equal counts; the dashed line is perfect."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, "mean prediction", "share with cancer", 4.2, 3.8)
        axes.plot([0, 1], [0, 1], color=_INK, alpha=0.35, lw=1, ls="--")
        share, mean = calibration_curve(labels, np.clip(scores, 0, 1), n_bins=bins, strategy="quantile")
        axes.plot(mean, share, marker="o", ms=4, lw=1.6, color=COLOURS[0])
        end = min(1.0, 1.15 * max(*mean, *share, 0.1))  # rare cancer: nearly all predictions are small
        axes.set_xlim(-0.02 * end, end)
        axes.set_ylim(-0.02 * end, end)
        return _svg(figure, title)


def stacked_bars(title: str, parts: Mapping[str, Mapping[str, float]], x_label: str) -> str:
    """Lying bars of stacked parts; `parts` is bar → part → length."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, x_label, "", 4.2, max(3.2, 0.26 * len(parts) + 1.4))
        names = [_short(name) for name in parts]
        left = np.zeros(len(names))
        kinds = list(dict.fromkeys(kind for bar in parts.values() for kind in bar))
        for colour, kind in zip(_cycle(len(kinds)), kinds, strict=True):
            lengths = np.array([float(bar.get(kind, 0)) for bar in parts.values()])
            axes.barh(range(len(names)), lengths, left=left, color=colour, height=0.7, label=kind)
            left += lengths
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=2)
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
        axes.legend(loc="upper right")
        return _svg(figure, title)


def _axes(title: str, x_label: str, y_label: str, width: float, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:10]}…{name[-10:]}"


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
