"""Which sample comes when, and every random number it is changed by: pure NumPy, outside DALI and torch.

Each number comes from Philox (Salmon et al. 2011), a counter-based generator, keyed by the seed and the epoch and
counted by the sample's place in the epoch. So a sample's numbers depend on nothing that was drawn before: the stream is
the same for any batch size, number of ranks, threads or device, and continues anywhere.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dali_pipes.settings import AugmentSettings, LoaderSettings

# One purpose, one counter: numbers added for one never shift another's.
_ORDER, _SAMPLE, _GRID, _HOLES, _MIX, _PARTNER = range(6)
_ROUNDING = 1e-6  # samples; a share of 0.1 is no tenth


class Draw(NamedTuple):
    """What a sample is changed by. The defaults change nothing.

    Attributes:
        hflip, vflip: mirrored left-right, upside-down.
        angle: rotation in degrees, counter-clockwise as seen.
        zoom: relative size.
        shift_x, shift_y: right and down, as a share of the output's width and height.
        patch_x, patch_y: in [0, 1], where in the level a patch lies; the middle is 0.5.
        pick: in [0, 1), which of the file's windows.
        window_shift: of the window's centre, in window widths.
        window_zoom: relative window width.
        brightness, contrast, gamma: v' = contrast (v^gamma - 1/2) + 1/2 + brightness.
        noise_sigma: standard deviation, in full ranges.
        noise_x, noise_y: in [0, 1), where in the noise bank.
        blur_sigma: in output pixels.
        sharpen: weight of the unsharp mask.
        grid: [n + 1, n + 1, 2] shifts (x, y) of the distortion grid's nodes, in cells; None for none.
        holes: [k, 4] of top, left, bottom, right in [0, 1], blacked out.
    """

    hflip: bool = False
    vflip: bool = False
    angle: float = 0.0
    zoom: float = 1.0
    shift_x: float = 0.0
    shift_y: float = 0.0
    patch_x: float = 0.5
    patch_y: float = 0.5
    pick: float = 0.0
    window_shift: float = 0.0
    window_zoom: float = 1.0
    brightness: float = 0.0
    contrast: float = 1.0
    gamma: float = 1.0
    noise_sigma: float = 0.0
    noise_x: float = 0.0
    noise_y: float = 0.0
    blur_sigma: float = 0.0
    sharpen: float = 0.0
    grid: NDArray[np.float32] | None = None
    holes: NDArray[np.float32] = np.zeros((0, 4), np.float32)


class Mix(NamedTuple):
    """How a sample is mixed with another one of its batch.

    Attributes:
        weight: of the sample itself, in [0, 1]; its partner has the rest.
        box: CutMix's top, left, bottom, right in [0, 1], taken from the partner; None for MixUp.
    """

    weight: float = 1.0
    box: tuple[float, float, float, float] | None = None


class Mixing(NamedTuple):
    """How a batch is mixed: a `Mix` a sample, and int64 [B], with which one; these form one circle."""

    mixes: Sequence[Mix]
    partners: NDArray[np.int64]


class _Streams(threading.local):
    """A thread's generator: to set its state costs the host a fifth of what it costs to make another."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.state = self.philox.state  # with no number left over
        self.generator = np.random.Generator(self.philox)


class Plan:
    """Order and random numbers of every epoch.

    Args:
        labels: 1 where there is cancer, anything else where not; one a row.
        settings: how samples are drawn.
        seed: of everything.
        train: shuffle, balance and augment; otherwise rows come in their own order, once each, unchanged.
        augment: strengths of the changes; None for none.
        rank, world_size: this process's share.
        weights: of each row, above 0, for weighted sampling; without them the classes are as likely as each other.
        hard: negatives to show more often, bool, one a row.
    """

    def __init__(
        self,
        labels: Sequence[float] | NDArray[np.floating],
        settings: LoaderSettings,
        seed: int,
        train: bool,
        augment: AugmentSettings | None = None,
        rank: int = 0,
        world_size: int = 1,
        weights: NDArray[np.float64] | None = None,
        hard: NDArray[np.bool_] | None = None,
    ) -> None:
        positive = np.asarray(labels) == 1
        self._weights, self._hard = weights, np.zeros(len(positive), bool) if hard is None else hard & ~positive
        self._positives, self._negatives = np.flatnonzero(positive), np.flatnonzero(~positive)
        self._is_positive = positive
        self.settings, self.seed, self.train = settings, seed, train
        self._streams = _Streams()
        self.augment = augment if train and augment is not None and augment.enabled else None
        self.rank, self.world_size = rank, world_size
        self.batch_size = settings.batch_size if train else settings.val_batch_size

    @property
    def samples(self) -> int:
        """Samples of an epoch, over all ranks, before a last partial batch is dropped."""
        return (self.settings.epoch_samples if self.train else None) or len(self._is_positive)

    @property
    def steps(self) -> int:
        """Batches of an epoch for this rank. In training every rank has as many."""
        if self.train:
            return self.samples // (self.batch_size * self.world_size)
        return -(-len(range(self.rank, self.samples, self.world_size)) // self.batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Rows of an epoch over all ranks, int64 [samples]. Its places are what `sample` is asked with."""
        if not self.train:
            return np.arange(self.samples, dtype=np.int64)
        rng = self._generator(epoch, _ORDER)
        if self.settings.sampling == "weighted":
            return self._weighted(rng)
        if self.settings.sampling == "balanced" and len(self._positives) and len(self._negatives):
            return self._balanced(rng)
        return self._taken(np.arange(len(self._is_positive)), self.samples, rng)

    def places(self, step: int) -> NDArray[np.int64]:
        """Places in the epoch's order that this rank's batch `step` holds.

        In training the ranks share each global batch in slices, so what one step holds does not depend on how many
        they are as long as the global batch is as large. Otherwise each takes every `world_size`-th row.
        """
        if self.train:
            first = (step * self.world_size + self.rank) * self.batch_size
            return np.arange(first, first + self.batch_size)
        mine = np.arange(self.rank, self.samples, self.world_size)
        return mine[step * self.batch_size : (step + 1) * self.batch_size]

    def drawn(self, epoch: int, steps: int | None = None) -> dict[str, int]:
        """How many samples of each class the epoch, or so many steps of it, really gives, over all ranks."""
        order = self.order(epoch)
        if self.train:
            order = order[: (self.steps if steps is None else steps) * self.batch_size * self.world_size]
        positives = int(self._is_positive[order].sum())
        return {"negative": len(order) - positives, "positive": positives}

    def sample(self, epoch: int, place: int) -> Draw:
        """The changes of the sample at a place of an epoch."""
        settings = self.augment
        if settings is None:
            return Draw()
        # Every number is drawn whether it is wanted or not: turning one change off leaves the others as they were.
        *numbers, patch_x, patch_y = self._generator(epoch, _SAMPLE, place).random(32).tolist()
        u = iter(numbers)
        chance = lambda probability: next(u) < probability  # noqa: E731
        spread = lambda largest: (2 * next(u) - 1) * largest  # noqa: E731
        hflip, vflip = chance(settings.hflip), chance(settings.vflip)
        affine = chance(settings.affine)
        angle, zoom = spread(settings.rotate_deg), 1 + spread(settings.scale)
        shift_x, shift_y = spread(settings.shift), spread(settings.shift)
        pick = next(u)
        window = chance(settings.window)
        window_shift, window_zoom = spread(settings.window_shift), 1 + spread(settings.window_scale)
        tone = chance(settings.tone)
        brightness, contrast = spread(settings.brightness), 1 + spread(settings.contrast)
        gamma = 1 + spread(settings.gamma)
        noise, noise_sigma = chance(settings.noise), next(u) * settings.noise_sigma
        noise_x, noise_y = next(u), next(u)
        blur, blur_sigma = chance(settings.blur), 0.3 + next(u) * max(settings.blur_sigma - 0.3, 0.0)
        sharpen, sharpness = chance(settings.sharpen), 0.2 + 0.8 * next(u)
        grid, dropout, grid_dropout = (
            chance(settings.grid),
            chance(settings.dropout),
            chance(settings.grid_dropout),
        )
        holes = []
        if dropout:
            holes.append(self._holes(epoch, place, settings))
        if grid_dropout:
            holes.append(_grid_holes(next(u), next(u), next(u)))
        return Draw(
            hflip=hflip,
            vflip=vflip,
            angle=angle if affine else 0.0,
            zoom=zoom if affine else 1.0,
            shift_x=shift_x if affine else 0.0,
            shift_y=shift_y if affine else 0.0,
            patch_x=patch_x,
            patch_y=patch_y,
            pick=pick if settings.choose_window else 0.0,
            window_shift=window_shift if window else 0.0,
            window_zoom=window_zoom if window else 1.0,
            brightness=brightness if tone else 0.0,
            contrast=contrast if tone else 1.0,
            gamma=gamma if tone else 1.0,
            noise_sigma=noise_sigma if noise else 0.0,
            noise_x=noise_x,
            noise_y=noise_y,
            blur_sigma=blur_sigma if blur else 0.0,
            sharpen=sharpness if sharpen else 0.0,
            grid=self._grid(epoch, place, settings) if grid else None,
            holes=np.concatenate(holes) if holes else np.zeros((0, 4), np.float32),
        )

    def mixing(self, epoch: int, places: NDArray[np.int64]) -> Mixing | None:
        """How the samples of a batch, at these places of an epoch, are mixed with one another; None where none are."""
        settings = self.augment
        if settings is None or not (settings.mixup or settings.cutmix) or not len(places):
            return None
        # By chance: neighbours would not do, for a balanced epoch has its positives at even distances.
        circle = self._generator(epoch, _PARTNER, int(places[0])).permutation(len(places))
        partners = np.empty(len(places), np.int64)
        partners[circle] = np.roll(circle, -1)
        return Mixing([self._mix(epoch, int(place), settings) for place in places], partners)

    def _mix(self, epoch: int, place: int, settings: AugmentSettings) -> Mix:
        """MixUp and CutMix in turns by chance where both are on."""
        rng = self._generator(epoch, _MIX, place)
        choice, y, x = rng.random(3)
        cut = settings.cutmix > 0 and (settings.mixup == 0 or choice < 0.5)
        alpha = settings.cutmix if cut else settings.mixup
        weight = float(rng.beta(alpha, alpha))
        if not cut:
            return Mix(weight)
        half = (1 - weight) ** 0.5 / 2
        box = (max(y - half, 0.0), max(x - half, 0.0), min(y + half, 1.0), min(x + half, 1.0))
        return Mix(weight, box)

    def _generator(self, epoch: int, purpose: int, place: int = 0) -> np.random.Generator:
        """The numbers of a purpose, from its first one on; of use until this thread asks for those of another."""
        streams = self._streams
        # The lowest word of the counter runs while numbers are drawn; the others name the stream.
        streams.state["state"]["counter"][:] = 0, place, purpose, 0
        streams.state["state"]["key"][:] = self.seed, epoch
        streams.philox.state = streams.state
        return streams.generator

    def _balanced(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Positives at even distances, each jittered within its own stretch: no stretch of the epoch lacks them."""
        total, share = self.samples, self.settings.positive_share
        # Stretches of 1 / share samples, whatever the epoch's length: with one positive in eight, each eight samples
        # from the first on, and so each batch of eight, have one.
        wanted = max(min(math.ceil(total * share - _ROUNDING), total - 1), 1)  # both classes, in a short one too
        edges = np.minimum(np.floor(np.arange(wanted + 1) / share + _ROUNDING), total).astype(np.int64)
        slots = edges[:-1] + np.floor(rng.random(wanted) * np.diff(edges)).astype(np.int64)
        order = np.empty(total, np.int64)
        taken = np.zeros(total, bool)
        taken[slots] = True
        order[taken] = self._taken(self._positives, wanted, rng)
        order[~taken] = self._drawn_negatives(total - wanted, rng)
        return order

    def _drawn_negatives(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Negatives of a balanced epoch: the hard ones have their share of it."""
        hard, others = (self._negatives[self._hard[self._negatives] == which] for which in (True, False))
        if not len(hard) or not len(others):
            return self._taken(self._negatives, count, rng)
        many = round(self.settings.hard_negative_share * count)
        both = np.concatenate([self._taken(hard, many, rng), self._taken(others, count - many, rng)])
        return rng.permutation(both)

    def _taken(self, rows: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """So many of the rows; without replacement none comes twice more often than another."""
        if self.settings.replacement:
            return rng.choice(rows, count).astype(np.int64)
        return _cycled(rows, count, rng)

    def _weighted(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """With replacement, by weight; without weights each class as likely as the other."""
        weights = self._weights
        if weights is None:
            weights = np.ones(len(self._is_positive))
            for part in (self._positives, self._negatives):
                if len(part):
                    weights[part] /= len(part)
        return rng.choice(len(weights), self.samples, p=weights / weights.sum()).astype(np.int64)

    def _grid(self, epoch: int, place: int, settings: AugmentSettings) -> NDArray[np.float32]:
        nodes = settings.grid_steps + 1
        shifts = self._generator(epoch, _GRID, place).random((nodes, nodes, 2))
        return ((2 * shifts - 1) * settings.grid_limit).astype(np.float32)

    def _holes(self, epoch: int, place: int, settings: AugmentSettings) -> NDArray[np.float32]:
        rng = self._generator(epoch, _HOLES, place)
        count = 1 + int(rng.random() * settings.dropout_holes)
        u = rng.random((settings.dropout_holes, 4))[:count]
        size = (0.25 + 0.75 * u[:, :2]) * settings.dropout_size
        corner = u[:, 2:] * (1 - size)
        return np.concatenate([corner, corner + size], axis=1).astype(np.float32)


def _cycled(rows: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """So many of the rows, shuffled anew each time round: none comes twice more often than another."""
    rounds = [rng.permutation(rows) for _ in range(-(-count // len(rows)))]
    return np.concatenate([*rounds, np.zeros(0, np.int64)])[:count].astype(np.int64)


def _grid_holes(phase_y: float, phase_x: float, u: float) -> NDArray[np.float32]:
    """GridMask's squares (Chen et al. 2020): a regular grid of 4 to 8 cells a side, half of each cell's side black."""
    cell = 1 / (4 + int(u * 5))
    starts = np.arange(-1, 9)
    y, x = np.meshgrid((starts + phase_y) * cell, (starts + phase_x) * cell, indexing="ij")
    holes = np.stack([y, x, y + cell / 2, x + cell / 2], axis=-1).reshape(-1, 4).clip(0, 1)
    inside = (holes[:, 2] > holes[:, 0]) & (holes[:, 3] > holes[:, 1])
    return holes[inside].astype(np.float32)
