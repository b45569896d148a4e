"""A synthetic mammogram with its truth: the outline of the breast and the boxes of its lesions.

Geometry is in millimetres, so that small and full pictures show the same anatomy at two resolutions. Everything is
drawn as a left breast, chest wall on the left, and mirrored for the right side; burnt-in text stays readable.

The tissue is 1/f noise, as measured in mammograms (Burgess 1999: a power spectrum of about f^-3), gathered around
the gland behind the nipple and thresholded to the area that BI-RADS density A, B, C or D stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

# rows, columns and millimetres a pixel: fields of 233 mm by 186 mm and by 179 mm
SIZES: dict[str, tuple[int, int, float]] = {"small": (640, 512, 0.364), "full": (3328, 2560, 0.07)}
TISSUE_SPACING = 0.364  # tissue is composed at this resolution; edges, lesions and noise at the picture's own
GLAND_SHARE = {"A": 0.10, "B": 0.28, "C": 0.52, "D": 0.78}  # area of the breast that is dense
Density = Literal["A", "B", "C", "D"]
LesionKind = Literal["spiculated", "ellipsoid", "calcifications", "cyst"]


@dataclass(frozen=True)
class Breast:
    """What both views of a breast have in common."""

    laterality: Literal["L", "R"]
    density: Density
    depth_mm: float  # nipple to chest wall
    half_height_mm: float
    implant: bool = False
    lesions: tuple[LesionKind, ...] = ()  # "cyst" is benign, the others are cancer


@dataclass(frozen=True)
class Lesion:
    """A lesion and its box in pixels of the picture."""

    kind: LesionKind
    top: int
    left: int
    height: int
    width: int

    @property
    def malignant(self) -> bool:
        """Whether it makes `cancer` 1."""
        return self.kind != "cyst"


@dataclass(frozen=True)
class Phantom:
    """A picture and its truth.

    `picture` is float32 [rows, columns]: 0 is air, 1 the densest tissue, with noise and implants a little beyond.
    `breast` is bool [rows, columns], true from the chest wall to the skin, pectoral muscle included.
    """

    picture: Image
    breast: Mask
    lesions: tuple[Lesion, ...]
    spacing: float


def generator(*key: int | str) -> np.random.Generator:
    """A generator that depends on nothing but its key."""
    words = [word for part in key for word in ([part] if isinstance(part, int) else list(part.encode()))]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def render(
    breast: Breast,
    view: str,
    seed: int,
    size: Literal["small", "full"] = "small",
    contrast: float = 1.0,
    noise: float = 0.012,
) -> Phantom:
    """Draw one view of a breast.

    Args:
        breast: what is to be drawn.
        view: CC and its like are drawn from above; MLO, ML, LM and LMO from the side, with the pectoral muscle.
        seed: the same arguments give the same pixels; another seed another breast.
        size: a key of `SIZES`.
        contrast: of the lesions; 1 is easy to see, 0 is invisible.
        noise: standard deviation of the detector's noise in dense tissue.
    """
    rows, columns, spacing = SIZES[size]
    frame = _Frame(rows, columns, spacing)
    outline = _outline(breast, view, generator(seed, "outline"))
    mask = frame.x[None, :] < outline.depth(frame.y)[:, None]
    coarse = _Frame(*SIZES["small"][:2], TISSUE_SPACING)
    reach = float(outline.depth(coarse.y).max()) + 10  # nothing to compose beyond the skin
    coarse = _Frame(coarse.shape[0], min(coarse.shape[1], int(reach / TISSUE_SPACING)), TISSUE_SPACING)
    tissue = _tissue(breast, outline, coarse, lambda name: generator(seed, name))
    picture = frame.take(tissue, coarse.spacing)
    picture += np.float32(0.020) * _fractal(generator(seed, "fine"), frame, 4.0, spacing)
    if breast.implant:
        _implant(picture, outline, frame, generator(seed, "implant"))
    lesions = [
        _lesion(kind, picture, breast, outline, frame, contrast, generator(seed, "lesion", index))
        for index, kind in enumerate(breast.lesions)
    ]
    edge = np.clip((outline.depth(frame.y)[:, None] - frame.x[None, :]) / (2 * spacing), 0, 1).astype(np.float32)
    picture *= edge
    if breast.laterality == "R":
        picture, mask = np.ascontiguousarray(picture[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
        lesions = [
            Lesion(each.kind, each.top, columns - each.left - each.width, each.height, each.width) for each in lesions
        ]
    _label(picture, breast.laterality, view, frame, generator(seed, "label"))
    grain = generator(seed, "grain").standard_normal(picture.shape, dtype=np.float32)
    variance = np.float32(noise**2) * (np.clip(picture, 0, 1) + np.float32(4.2))  # of the quanta, and of the detector
    grain *= np.sqrt(variance, out=variance)
    grain *= np.where(mask, np.float32(1), np.float32(0.15))
    picture += grain
    return Phantom(picture, mask, tuple(lesions), spacing)


class _Frame:
    """The pixel grid in millimetres: x from the chest wall, y from the top."""

    def __init__(self, rows: int, columns: int, spacing: float) -> None:
        self.shape, self.spacing = (rows, columns), spacing
        self.x = ((np.arange(columns) + 0.5) * spacing).astype(np.float32)
        self.y = ((np.arange(rows) + 0.5) * spacing).astype(np.float32)

    @property
    def height_mm(self) -> float:
        return self.shape[0] * self.spacing

    def take(self, picture: Image, spacing: float) -> Image:
        """The part of a picture of another spacing that this frame covers, from the same corner; 0 beyond it."""
        if spacing == self.spacing:
            whole = np.zeros(self.shape, np.float32)
            whole[:, : picture.shape[1]] = picture
            return whole
        zoom = self.spacing / spacing
        matrix = np.array([[zoom, 0, zoom / 2 - 0.5], [0, zoom, zoom / 2 - 0.5]], np.float32)
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(picture, matrix, self.shape[::-1], flags=flags)  # pyright: ignore[reportReturnType]

    def pixel(self, millimetres: float) -> float:
        return millimetres / self.spacing


@dataclass(frozen=True)
class _Outline:
    """The skin as a depth over y, where the nipple is, and the muscle's corner in side views."""

    depth: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    nipple: tuple[float, float]  # x, y in millimetres
    reach: tuple[float, float]  # y of the upper and lower end of the breast
    muscle: tuple[float, float] | None  # width at the top edge and length down the chest wall


def _outline(breast: Breast, view: str, rng: np.random.Generator) -> _Outline:
    height = SIZES["small"][0] * SIZES["small"][2]
    side = view in ("MLO", "ML", "LM", "LMO")
    depth, half = breast.depth_mm * rng.uniform(0.95, 1.05), breast.half_height_mm * rng.uniform(0.95, 1.05)
    ripple = rng.uniform(-1, 1, 4), rng.uniform(0, 2 * np.pi, 4)
    above = rng.uniform(1.9, 2.3)
    if side:
        nipple_y = height * rng.uniform(0.50, 0.60)
        lower = min(half * rng.uniform(0.85, 1.0), height - nipple_y - 8)
        axilla = depth * rng.uniform(0.35, 0.55)
        fold = rng.uniform(4, 14)
        muscle = (rng.uniform(38, 62), rng.uniform(95, 135))
    else:
        nipple_y = height * rng.uniform(0.46, 0.54)
        lower, axilla, fold, muscle = half, 0.0, 0.0, None
    upper = nipple_y if side else min(half, nipple_y - 6)
    lower = min(lower, height - nipple_y - 6)

    def skin(y: NDArray[np.floating]) -> NDArray[np.floating]:
        v = np.where(y < nipple_y, (nipple_y - y) / upper, (y - nipple_y) / lower)
        base = np.where(y < nipple_y, axilla, fold if side else 0.0)
        bulge = np.clip(1 - np.clip(v, 0, 1) ** above, 0, 1) ** (0.75 if side else 0.62)
        line = base + (depth - base) * bulge
        waves = sum(
            a * np.sin((k + 1) * 2 * np.pi * y / height + p) for k, (a, p) in enumerate(zip(*ripple, strict=True))
        )
        line = line + 0.9 * np.asarray(waves) * np.clip(bulge, 0, 1)
        line = line + 5.5 * np.exp(-(np.abs(y - nipple_y) ** 3) / (2 * 4.2**3)) * (depth > 30)  # the nipple in profile
        return np.where((v >= 1) & (base == 0), 0, line)

    step = 0.25
    table = np.arange(-10, height + 10, step)
    rounded = _smoothed(skin(table), 1.0 / step)
    if side:  # the fold under the breast is a wide curve
        below = np.clip((table - nipple_y - 0.8 * lower) / (0.15 * lower), 0, 1)
        rounded = rounded * (1 - below) + _smoothed(rounded, 5.0 / step) * below

    def depth_at(y: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.interp(y, table, rounded).astype(np.float32)

    return _Outline(depth_at, (depth, nipple_y), (nipple_y - upper, nipple_y + lower), muscle)


def _smoothed(line: NDArray[np.floating], sigma: float) -> NDArray[np.floating]:
    column = cv2.GaussianBlur(line[:, None], (1, 0), sigmaX=1e-6, sigmaY=sigma, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(column[:, 0], np.float64)


def _tissue(breast: Breast, outline: _Outline, frame: _Frame, draw: Callable[[str], np.random.Generator]) -> Image:
    """Fat, gland, ducts, vessels, skin and muscle at the tissue's resolution, before noise."""
    x, y = frame.x[None, :], frame.y[:, None]
    mask = x < outline.depth(frame.y)[:, None]
    nipple_x, nipple_y = outline.nipple
    wall = 64  # pixels of tissue beyond the picture's edges: only the side of the skin has air
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), wall, wall, wall, 0, cv2.BORDER_REPLICATE)
    padded = cv2.copyMakeBorder(padded, 0, 0, 0, 1, cv2.BORDER_CONSTANT, value=0)
    skin_mm = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[wall:-wall, wall:-1] * frame.spacing
    thickness = np.sqrt(1 - (1 - np.clip(skin_mm / 18.0, 0, 1)) ** 2)  # the edge of a compressed breast is round
    cloud = _fractal(draw("cloud"), frame, 64.0, 2.0)
    gland = _gland(breast.density, mask, outline, frame, cloud, draw("gland"))
    strands = _strands(frame, (nipple_x, nipple_y), draw("strands"))
    detail = _fractal(draw("detail"), frame, 14.0, frame.spacing)
    fat = 0.24 + 0.03 * cloud + 0.014 * strands + 0.012 * detail
    dense = 0.29 + 0.055 * detail + 0.016 * strands + 0.03 * cloud
    picture = (fat + gland * dense) * (0.32 + 0.68 * thickness)
    picture += _vessels(frame, outline, draw("vessels")) * thickness
    picture += 0.13 * np.clip(1.8 - skin_mm / 1.2, 0, 1)
    nipple = np.exp(-(((x - nipple_x - 1.5) / 4.5) ** 2 + ((y - nipple_y) / 5.0) ** 2))
    picture += 0.16 * nipple
    if outline.muscle is not None:
        _muscle(picture, outline.muscle, frame, draw("muscle"))
    return np.clip(picture, 0.02, 0.97).astype(np.float32)  # the caller cuts along the skin, at its own resolution


def _gland(
    density: str, mask: Mask, outline: _Outline, frame: _Frame, cloud: Image, rng: np.random.Generator
) -> NDArray[np.floating]:
    """Share of glandular tissue in each pixel, 0 to 1, over the area that the density stands for."""
    nipple_x, nipple_y = outline.nipple
    x, y = frame.x[None, :], frame.y[:, None]
    centre_x, centre_y = nipple_x * rng.uniform(0.50, 0.62), nipple_y - rng.uniform(0, 12)
    spread_x, spread_y = nipple_x * 0.42, (outline.reach[1] - outline.reach[0]) * 0.27
    bump = np.exp(-(((x - centre_x) / spread_x) ** 2 + ((y - centre_y) / spread_y) ** 2) / 2)
    field = 2.6 * bump + 0.65 * cloud + 0.30 * _fractal(rng, frame, 10.0, 1.25)
    share = GLAND_SHARE[density] * rng.uniform(0.85, 1.15)
    level = np.quantile(field[::4, ::4][mask[::4, ::4]], 1 - min(share, 0.92))
    return 1 / (1 + np.exp(-np.clip((field - level) * 4.0, -30, 30)))


def _strands(frame: _Frame, nipple: tuple[float, float], rng: np.random.Generator) -> Image:
    """Ducts and ligaments: ridges that run towards the nipple, from noise in polar coordinates around it."""
    x, y = np.broadcast_arrays(frame.x[None, :], frame.y[:, None])
    radius, angle = cv2.cartToPolar(x - np.float32(nipple[0] + 8), y - np.float32(nipple[1]))
    table = rng.standard_normal((1024, 24), dtype=np.float32)
    table = cv2.GaussianBlur(np.concatenate([table[-16:], table, table[:16]]), (0, 0), sigmaX=1.1, sigmaY=1.6)[16:-16]
    table = table / table.std()
    wobble = _fractal(rng, frame, 40.0, 3.0)
    across = (angle + 0.10 * wobble) * np.float32(1023 / (2 * np.pi))
    along = radius * np.float32(22 / 240.0) + 0.4 * wobble
    ridges = cv2.remap(table, along, across, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    lines = np.exp(-((ridges / np.float32(0.35)) ** 2))  # bright where the noise crosses zero
    return (lines - np.float32(0.3)) / np.float32(0.35)


def _vessels(frame: _Frame, outline: _Outline, rng: np.random.Generator) -> Image:
    canvas = np.zeros(frame.shape, np.uint8)
    nipple_x, nipple_y = outline.nipple
    for _ in range(int(rng.integers(3, 7))):
        start_y = rng.uniform(outline.reach[0] + 10, outline.reach[1] - 10)
        heading = np.arctan2(nipple_y + rng.normal(0, 15) - start_y, nipple_x) * 0.8
        turns = np.cumsum(rng.normal(0, 0.045, 60)) + heading
        step = nipple_x * rng.uniform(0.55, 0.95) / 60
        line = np.stack([np.cumsum(np.cos(turns)), np.cumsum(np.sin(turns))], 1) * step + [rng.uniform(0, 15), start_y]
        points = (line / frame.spacing * 16).astype(np.int32)
        width = max(1, round(rng.uniform(0.9, 1.8) / frame.spacing))
        cv2.polylines(canvas, [points[:, None, :]], False, int(rng.integers(120, 255)), width, cv2.LINE_AA, 4)
    soft = cv2.GaussianBlur(canvas, (0, 0), 0.5 / frame.spacing)
    return soft.astype(np.float32) * np.float32(0.13 / 255)


def _muscle(
    picture: NDArray[np.floating], corner: tuple[float, float], frame: _Frame, rng: np.random.Generator
) -> None:
    """The pectoral muscle: a bright triangle with a slightly convex edge, its fibres along that edge."""
    width, length = corner
    rows, columns = (int(frame.pixel(reach)) + 1 for reach in (length + 6, width + 6))
    corner_frame = _Frame(min(rows, frame.shape[0]), min(columns, frame.shape[1]), frame.spacing)
    x, y = corner_frame.x[None, :], corner_frame.y[:, None]
    edge = width * (1 - np.clip(y / length, 0, 1) ** 1.25)
    inside = 1 / (1 + np.exp(-np.clip((edge - x) / 0.9, -30, 30))) * np.clip((length - y) / 8 + 0.5, 0, 1)
    wobble, grain = _fractal(rng, corner_frame, 50.0, 3.0), _fractal(rng, corner_frame, 30.0, 1.0)
    fibres = np.sin((x / width + y / length) * rng.uniform(20, 32) + 2.0 * wobble)
    body = 0.62 + 0.015 * fibres + 0.03 * grain + 0.04 * (1 - y / length)
    part = picture[: corner_frame.shape[0], : corner_frame.shape[1]]
    part += inside * (body - part)


def _implant(picture: Image, outline: _Outline, frame: _Frame, rng: np.random.Generator) -> None:
    """A prosthesis before the chest wall: nearly saturated, with a brighter shell."""
    depth, (upper, lower) = outline.nipple[0], outline.reach
    centre_y = outline.nipple[1] + rng.uniform(-4, 4)
    half_x, half_y = depth * rng.uniform(0.58, 0.68), (lower - upper) * rng.uniform(0.27, 0.32)
    radius = np.sqrt((frame.x[None, :] / half_x) ** 2 + ((frame.y[:, None] - centre_y) / half_y) ** 2)
    inside = np.clip((1 - radius) * half_x / 0.8, 0, 1)
    body = 0.90 + 0.07 * np.exp(-(((radius - 0.985) * half_x / 1.2) ** 2))
    picture[...] = np.where(inside > 0, picture * (1 - inside) + inside * body, picture)


def _lesion(
    kind: LesionKind,
    picture: Image,
    breast: Breast,
    outline: _Outline,
    frame: _Frame,
    contrast: float,
    rng: np.random.Generator,
) -> Lesion:
    """Draw a lesion somewhere inside the gland and say where it is."""
    radius = float(rng.uniform(4, 8) if kind == "cyst" else rng.uniform(9, 15))
    x, y = _place(breast, outline, radius, rng)
    reach = radius * (2.1 if kind == "spiculated" else 1.3)
    left, right = max(0, int(frame.pixel(x - reach))), min(frame.shape[1], int(frame.pixel(x + reach)) + 1)
    top, bottom = max(0, int(frame.pixel(y - reach))), min(frame.shape[0], int(frame.pixel(y + reach)) + 1)
    u = (frame.x[None, left:right] - np.float32(x)) / np.float32(radius)
    v = (frame.y[top:bottom, None] - np.float32(y)) / np.float32(radius)
    if kind == "calcifications":
        added = _calcifications(u * radius, v * radius, radius, rng)
    else:
        added = _mass(u, v, kind, rng)
    picture[top:bottom, left:right] += np.float32(contrast) * added.astype(np.float32)
    return Lesion(kind, top, left, bottom - top, right - left)


def _place(breast: Breast, outline: _Outline, radius: float, rng: np.random.Generator) -> tuple[float, float]:
    """A point well inside the breast, before the muscle and beside an implant's centre, in millimetres."""
    nipple_x, nipple_y = outline.nipple
    upper, lower = outline.reach
    for _ in range(200):
        x = rng.uniform(0.62 if breast.implant else 0.18, 0.84) * nipple_x
        y = nipple_y + rng.uniform(-0.55, 0.55) * (min(nipple_y - upper, lower - nipple_y))
        room = float(outline.depth(np.array([y - radius, y, y + radius], np.float32)).min()) - x
        behind = outline.muscle is not None and x < outline.muscle[0] * (1 - y / outline.muscle[1]) + radius
        if room > radius + 5 and not behind:
            return float(x), float(y)
    return nipple_x * 0.6, nipple_y


def _mass(u: Image, v: Image, kind: LesionKind, rng: np.random.Generator) -> NDArray[np.floating]:
    """A mass over unit coordinates: a soft ellipsoid, or an irregular core with spicules."""
    turn, ratio = rng.uniform(0, np.pi), rng.uniform(0.72, 1.0)
    a, b = u * np.cos(turn) + v * np.sin(turn), (v * np.cos(turn) - u * np.sin(turn)) / ratio
    distance, angle = np.hypot(a, b), np.arctan2(b, a)
    if kind != "spiculated":
        amplitude = 0.10 if kind == "cyst" else 0.52
        return amplitude * np.clip(1 - distance**2, 0, None) ** 0.8
    lobes = sum(rng.uniform(-0.10, 0.10) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 7))
    core = 1 / (1 + np.exp(np.clip((distance - 0.72 * (1 + lobes)) * 14, -30, 30)))
    spicules = np.zeros_like(distance)
    for _ in range(int(rng.integers(12, 20))):
        heading, length, width = rng.uniform(-np.pi, np.pi), rng.uniform(1.2, 2.0), rng.uniform(0.04, 0.075)
        forward = a * np.cos(heading) + b * np.sin(heading)
        off = b * np.cos(heading) - a * np.sin(heading) + rng.uniform(-0.1, 0.1) * forward**2
        ray = np.exp(-((off / (width * np.clip(1.4 - 0.5 * forward, 0.4, None))) ** 2))
        spicules = np.maximum(spicules, ray * np.clip(length - forward, 0, 0.5) * 2 * (forward > 0))
    return 0.52 * core * (0.85 + 0.15 * np.clip(1 - distance, 0, 1)) + 0.25 * spicules * (1 - core)


def _calcifications(u: Image, v: Image, radius: float, rng: np.random.Generator) -> NDArray[np.floating]:
    """A cluster of 25 to 50 specks of 0.4 to 1 mm in a faint haze; `u` and `v` in millimetres."""
    added = 0.12 * np.exp(-(u**2 + v**2) / (2 * (0.5 * radius) ** 2))
    for _ in range(int(rng.integers(25, 51))):
        spread = np.clip(rng.normal(0, 0.42, 2), -0.95, 0.95) * radius
        size, bright = rng.uniform(0.4, 1.0), rng.uniform(0.35, 0.7)
        added = added + bright * np.exp(-((u - spread[0]) ** 2 + (v - spread[1]) ** 2) / (2 * (size / 1.7) ** 2))
    return np.minimum(added, 0.8)


def _label(picture: Image, laterality: str, view: str, frame: _Frame, rng: np.random.Generator) -> None:
    """Burn the side and view into a corner away from the chest wall, sometimes with a technician's initials."""
    scale, thick = 0.30 / frame.spacing, max(1, round(0.6 / frame.spacing))
    initials = ["".join(chr(65 + code) for code in rng.integers(0, 26, 2))] if rng.random() < 0.4 else []
    top = rng.uniform(10, 18) if rng.random() < 0.7 else frame.height_mm - rng.uniform(16, 24)
    canvas = np.zeros(frame.shape, np.uint8)
    for index, text in enumerate([f"{laterality} {view}", *initials]):
        width = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thick)[0][0]
        margin = frame.pixel(rng.uniform(5, 9))
        left = frame.shape[1] - margin - width if laterality == "L" else margin
        at = (int(left), int(frame.pixel(top + 11 * index)))
        cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thick, cv2.LINE_AA)
    np.maximum(picture, canvas * np.float32(0.95 / 255), out=picture)


def _fractal(rng: np.random.Generator, frame: _Frame, coarsest_mm: float, finest_mm: float) -> Image:
    """1/f noise of unit variance between two wavelengths: each octave is half as wide and half as strong."""
    rows, columns = (int(np.ceil(n * frame.spacing / coarsest_mm)) + 3 for n in frame.shape)
    step, amplitude = coarsest_mm, 1.0
    field = rng.standard_normal((rows, columns), dtype=np.float32)
    while step / 2 >= finest_mm:
        step, amplitude = step / 2, amplitude / 2
        rows, columns = field.shape[0] * 2, field.shape[1] * 2
        rows, columns = (
            min(n, int(m * frame.spacing / step) + 4) for n, m in zip((rows, columns), frame.shape, strict=True)
        )
        field = cv2.resize(field, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)[:rows, :columns]
        field += np.float32(amplitude) * rng.standard_normal((rows, columns), dtype=np.float32)
    zoom = step / frame.spacing
    matrix = np.array([[1 / zoom, 0, 1], [0, 1 / zoom, 1]], np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    whole = cv2.warpAffine(field, matrix, frame.shape[::-1], flags=flags, borderMode=cv2.BORDER_REFLECT)
    whole *= np.float32(1 / whole[::4, ::4].std())
    return np.asarray(whole, np.float32)
