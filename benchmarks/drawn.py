"""The full-size synthetic pictures that benchmarks measure on, drawn side by side on all cores."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from preprocessing.phantom import SIZES, Breast, generator, render
from preprocessing.synth_dicom import MACHINES, Exposure, stored_values, write


@dataclass(frozen=True)
class Drawn:
    """A picture of 3328 by 2560, 12 bits."""

    breast: Breast
    view: str
    seed: int
    stored: NDArray[np.uint16]

    def dicom(self, transfer_syntax: str) -> bytes:
        """The picture as a DICOM file."""
        machine = replace(MACHINES[0], transfer_syntax=transfer_syntax)
        side, spacing = self.breast.laterality, SIZES["full"][2]
        exposure = Exposure("1", str(self.seed), side, self.view, 60.0, self.breast.implant, spacing, self.seed)
        return write(self.stored, machine, exposure)


def draw(count: int) -> list[Drawn]:
    """So many pictures, no two alike."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_drawn, breasts(count)))


def dicom_files(pictures: list[Drawn], transfer_syntax: str) -> list[bytes]:
    """The pictures as DICOM files, encoded side by side."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(partial(Drawn.dicom, transfer_syntax=transfer_syntax), pictures))


def breasts(count: int) -> Iterator[tuple[Breast, str, int]]:
    """Breasts of every density, side and view, small and large, some with implants; each with its view and seed."""
    for seed in range(count):
        rng = generator(seed, "crop quality")
        size = rng.uniform(0.0, 1.0)
        yield (
            Breast(
                laterality="L" if seed % 2 else "R",
                density="ABCD"[(seed // 4) % 4],  # pyright: ignore[reportArgumentType]
                depth_mm=45 + 95 * size,
                half_height_mm=40 + 65 * size,
                implant=seed % 10 == 9,
            ),
            "MLO" if (seed // 2) % 2 else "CC",
            seed,
        )


def _drawn(breast: tuple[Breast, str, int]) -> Drawn:
    picture = render(*breast, "full").picture
    return Drawn(*breast, np.asarray(stored_values(picture, MACHINES[0]), np.uint16))
