"""What the breast crop keeps of the breast and drops of the background, on synthetic pictures whose outline is known.

    python benchmarks/crop_quality.py [--pictures N] [--size full] [--json FILE]

Every picture is drawn once and then disturbed in each of the ways below; breast that a disturbance paints over does not
count. "Ideal" is the share of background outside the
tightest box around the true outline: no crop that keeps the breast drops more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.breast import find_breast
from preprocessing.phantom import generator, render
from training import run_files

try:
    from benchmarks.drawn import breasts
except ImportError:  # called by its path
    from drawn import breasts

TOP = 4095  # 12 bits
Values = NDArray[np.float32]
Disturbance = Callable[[Values, bool, np.random.Generator], Values]


def _raised(values: Values, left: bool, rng: np.random.Generator) -> Values:
    """A background far from zero that slopes across the picture."""
    slope = np.linspace(0, rng.uniform(0, 0.08), values.shape[1], dtype=np.float32)
    return values * np.float32(0.7) + np.float32(rng.uniform(0.1, 0.25) * TOP) + slope * TOP


def _noisy(values: Values, left: bool, rng: np.random.Generator) -> Values:
    """Noise over everything, two hundredths of the range."""
    return values + rng.normal(0, 0.02 * TOP, values.shape).astype(np.float32)


def _strips(values: Values, left: bool, rng: np.random.Generator) -> Iterator[tuple[slice, slice]]:
    """Thin strips along one to four of the picture's edges."""
    rows, columns = values.shape
    for side in rng.permutation(4)[: int(rng.integers(1, 5))]:
        width = max(2, int(rng.uniform(0.005, 0.03) * columns))
        yield (
            (slice(0, width), slice(None)),
            (slice(rows - width, rows), slice(None)),
            (slice(None), slice(0, width)),
            (slice(None), slice(columns - width, columns)),
        )[side]


def _bright_frame(values: Values, left: bool, rng: np.random.Generator) -> Values:
    """Collimator edges as bright strips."""
    values = values.copy()
    for strip in _strips(values, left, rng):
        values[strip] = rng.uniform(0.5, 1.0) * TOP
    return values


def _noise_border(values: Values, left: bool, rng: np.random.Generator) -> Values:
    """Strips of pure noise along the edges."""
    values = values.copy()
    for strip in _strips(values, left, rng):
        values[strip] = rng.integers(0, TOP + 1, values[strip].shape)
    return values


def _padding(values: Values, left: bool, rng: np.random.Generator) -> Values:
    """Strips of zeros along the edges, beside a background that is not zero."""
    values = values + np.float32(0.05 * TOP)
    for strip in _strips(values, left, rng):
        values[strip] = 0
    return values


def _plate(values: Values, left: bool, rng: np.random.Generator) -> Values:
    """A film's label plate: a bright rectangle with dark text, in a corner away from the chest wall."""
    values = values.copy()
    rows, columns = values.shape
    height, width = int(rng.uniform(0.03, 0.08) * rows), int(rng.uniform(0.10, 0.20) * columns)
    top = int(rng.uniform(0, 0.03) * rows) if rng.random() < 0.5 else int(rows - height - rng.uniform(0, 0.03) * rows)
    start = int(columns - width - rng.uniform(0, 0.03) * columns) if left else int(rng.uniform(0, 0.03) * columns)
    plate = np.full((height, width), 230, np.uint8)
    cv2.putText(plate, "MLO 17", (3, height - 4), cv2.FONT_HERSHEY_SIMPLEX, height / 40, 25, 2)
    part = values[top : top + height, start : start + width]
    np.maximum(part, plate * np.float32(TOP / 255), out=part)
    return values


def _negative(values: Values, left: bool, rng: np.random.Generator) -> Values:
    """A negative that says it is none: the background is bright."""
    return TOP - values


def _dim(values: Values, left: bool, rng: np.random.Generator) -> Values:
    """A few very bright pixels far above all tissue, as implants' clips and markers are."""
    values = values * np.float32(0.25)
    rows, columns = values.shape
    at = int(rng.uniform(0.3, 0.7) * rows), int((0.2 if left else 0.8) * columns)
    cv2.circle(values, at[::-1], max(2, columns // 80), float(TOP), -1)
    return values


DISTURBANCES: dict[str, Disturbance | None] = {
    "none": None,
    "raised background": _raised,
    "noise": _noisy,
    "bright collimator strips": _bright_frame,
    "pure-noise strips": _noise_border,
    "padding strips": _padding,
    "label plate": _plate,
    "dim, with a bright marker": _dim,
    "undeclared negative": _negative,
}


def disturbed(name: str, picture: NDArray[np.float32], left: bool, seed: int) -> NDArray[np.uint16]:
    """Tile values of a phantom's picture (0 air to 1 dense), disturbed in the way of that name."""
    return np.clip(_changed(name, picture, left, seed, 0), 0, TOP).astype(np.uint16)


def hidden(name: str, picture: NDArray[np.float32], left: bool, seed: int) -> NDArray[np.bool_]:
    """Where a disturbance overwrites the picture, so that no breast is left there to keep: what no longer depends on
    it."""
    return _changed(name, picture, left, seed, 0) == _changed(name, picture, left, seed, 8)


def _changed(name: str, picture: NDArray[np.float32], left: bool, seed: int, shift: float) -> Values:
    values = ((0.01 + 0.85 * picture) * TOP + shift).astype(np.float32)
    change = DISTURBANCES[name]
    return values if change is None else change(values, left, generator(seed, name))


def shares(values: NDArray[np.uint16], mask: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Share of the breast kept, of the background dropped, and of the background that an ideal box would drop."""
    inside = np.zeros_like(mask)
    inside[find_breast(values).crop.slices] = True
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    ideal = np.zeros_like(mask)
    ideal[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    background = ~mask
    return (
        float(inside[mask].mean()),
        float(1 - inside[background].mean()),
        float(1 - ideal[background].mean()),
    )


def measure(count: int, size: str = "small", names: list[str] | None = None) -> list[dict[str, Any]]:
    """One row a disturbance: the least and mean share kept, the mean share dropped and what was possible."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names or DISTURBANCES}
    for breast, view, seed in breasts(count):
        phantom = render(breast, view, seed, size)  # pyright: ignore[reportArgumentType]
        for name, rows in found.items():
            drawn = phantom.picture, breast.laterality == "L", seed
            rows.append(shares(disturbed(name, *drawn), phantom.breast & ~hidden(name, *drawn)))
    return [
        {
            "disturbance": name,
            "pictures": len(rows),
            "kept_least": min(kept for kept, _, _ in rows),
            "kept_mean": float(np.mean([kept for kept, _, _ in rows])),
            "below_99.5": sum(kept < 0.995 for kept, _, _ in rows),
            "dropped_mean": float(np.mean([dropped for _, dropped, _ in rows])),
            "ideal_mean": float(np.mean([ideal for _, _, ideal in rows])),
        }
        for name, rows in found.items()
    ]


@click.command()
@click.option("--pictures", type=click.IntRange(1), default=40, show_default=True, help="Pictures a disturbance.")
@click.option("--size", type=click.Choice(["small", "full"]), default="small", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), default=None, help="Write the rows to this file too.")
def main(pictures: int, size: str, out: Path | None) -> None:
    """Print the table of docs/crop.md."""
    rows = measure(pictures, size)
    print("| disturbance | pictures | kept, least | kept, mean | dropped | dropped by an ideal box |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        shown = [f"{row[key]:.2%}" for key in ("kept_least", "kept_mean", "dropped_mean", "ideal_mean")]
        print(f"| {row['disturbance']} | {row['pictures']} | {' | '.join(shown)} |")
    if out:
        run_files.write_json(out, {"size": size, "rows": rows})


if __name__ == "__main__":
    main()
