"""The report's pictures: samples of a store, best and worst cases, and the places that raised a prediction."""

from __future__ import annotations

import base64
import logging
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from preprocessing import tiles
from preprocessing.errors import UserError
from preprocessing.manifest import Store, level_column
from training.runs import Run

THUMBNAIL = 260  # longest side of a picture in pixels
CASES = 6  # of each kind
SAMPLES = 8

log = logging.getLogger(__name__)


def samples(store: Store, rows: pd.DataFrame) -> list[dict[str, str]]:
    """Pictures spread evenly over the rows of each class, as many of both where there are: `uri`, `caption` and `image`
    (its id) each."""
    cancer = (rows["cancer"] == 1).to_numpy()
    with_cancer, others = np.flatnonzero(cancer), np.flatnonzero(~cancer)
    count = min(len(with_cancer), max(SAMPLES // 2, SAMPLES - len(others)))
    chosen = np.sort(np.concatenate([_spread(with_cancer, count), _spread(others, SAMPLES - count)]))
    found = (_thumbnail(store, rows.iloc[index]) for index in chosen.tolist())
    return [picture for picture in found if picture]


def _spread(positions: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of them, evenly spread."""
    return positions[np.unique(np.linspace(0, len(positions) - 1, min(count, len(positions))).astype(int))]


def cases(run: Run, store: Store, frame: pd.DataFrame, breasts: pd.DataFrame, threshold: float) -> list[dict[str, Any]]:
    """The pictures that the models judged best and worst, by their out-of-fold prediction.

    Args:
        run: for the models.
        store: for the pictures.
        frame: a row a picture.
        breasts: a row a breast; one with cancer is found where its prediction reaches the threshold.
        threshold: the chosen one.

    Returns:
        `title` and `pictures` of each kind; a picture stands beside itself under Grad-CAM of the model that
        judged it, where that model can be opened.
    """
    positives = frame[frame["cancer"] == 1].sort_values("prediction", ascending=False)
    negatives = frame[frame["cancer"] == 0].sort_values("prediction", ascending=False)
    found = positives["prediction_id"].isin(breasts.loc[breasts["prediction"] >= threshold, "prediction_id"])
    groups = {
        "Cancers found with the most confidence": positives[found].head(CASES),
        "Cancers missed": positives[~found].tail(CASES)[::-1],
        "Healthy pictures with the highest predictions": negatives.head(CASES),
    }
    everything = pd.concat(groups.values()).drop_duplicates("image_id")
    rows = store.manifest.set_index("image_id", drop=False)
    everything = everything[everything["image_id"].isin(rows.index)]
    looked = _overlays(run, store, everything)
    described = []
    for title, chosen in groups.items():
        pictures = []
        for _, case in chosen[chosen["image_id"].isin(rows.index)].iterrows():
            picture = _thumbnail(store, rows.loc[case["image_id"]])
            if picture:
                picture["caption"] += f", prediction {case['prediction']:.3f}"
                picture["uri"] = looked.get(case["image_id"], picture["uri"])
                pictures.append(picture)
        if pictures:
            described.append({"title": title, "pictures": pictures, "overlaid": bool(looked)})
    return described


def _overlays(run: Run, store: Store, chosen: pd.DataFrame) -> dict[str, str]:
    """Image id → picture and overlay side by side as a data URI, each by the fold that had not seen it."""
    from training.inference.assemble import open_ensemble
    from training.inference.explain import explain

    found: dict[str, str] = {}
    for fold in run.folds:
        own = chosen[chosen["fold"].astype(int) == fold.fold]
        rows = store.manifest[store.manifest["image_id"].isin(own["image_id"])].reset_index(drop=True)
        if rows.empty or not fold.best.is_file():
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                ensemble = open_ensemble([fold.folder], "cpu")
                predictions = own.set_index("image_id")["prediction"].reindex(rows["image_id"]).to_numpy(np.float64)
                explain(ensemble, store, rows, predictions, Path(folder), threshold=-1.0, method="gradcam")
            except (UserError, OSError, tiles.TileError) as error:  # the page is worth having without overlays
                log.warning("No Grad-CAM overlays for %s: %s", fold.folder, error)
                continue
            for path in Path(folder).glob("*.json"):
                picture = cv2.imread(str(path.with_suffix(".png")))
                identity = pd.read_json(path, typ="series", dtype=False)["image_id"]
                if picture is not None:
                    row = rows.loc[rows["image_id"] == str(identity)].iloc[0]
                    found[str(identity)] = _uri(_cropped(np.asarray(picture, np.uint8), row), 2 * THUMBNAIL)
    return found


def _cropped(pair: NDArray[np.uint8], row: pd.Series) -> NDArray[np.uint8]:
    """A picture and its overlay, uint8 [rows, 2 * columns, 3], both cut to the breast, with a gap between them."""
    halves = np.hsplit(pair, 2)
    scale = pair.shape[0] / float(row["source_rows"])
    top, left = round(row["crop_top"] * scale), round(row["crop_left"] * scale)
    bottom = max(top + 1, round((row["crop_top"] + row["crop_height"]) * scale))
    right = max(left + 1, round((row["crop_left"] + row["crop_width"]) * scale))
    cut = [half[top:bottom, left:right] for half in halves]
    gap = np.full((cut[0].shape[0], max(2, cut[0].shape[1] // 60), 3), 128, np.uint8)
    return np.hstack([cut[0], gap, cut[1]])


def _thumbnail(store: Store, row: pd.Series) -> dict[str, str] | None:
    """A small picture, windowed over the breast's percentiles, as a data URI; None where its tile cannot be read."""
    level = store.levels[-1]
    try:
        values = tiles.read_level(store.root / row[level_column("path", level)]).astype(np.float32)
    except (OSError, ValueError, tiles.TileError):
        return None
    low, high = float(row["percentile_low"]), float(row["percentile_high"])
    shown = (np.clip((values - low) / max(high - low, 1), 0, 1) * 255).astype(np.uint8)
    label = {0.0: "no cancer", 1.0: "cancer"}.get(float(row["cancer"]), "label unknown")
    caption = " ".join(part for part in (str(row["laterality"]), str(row["view"])) if part)
    return {
        "uri": _uri(shown, THUMBNAIL),
        "caption": f"{caption or 'view unknown'}, {label}",
        "image": str(row["image_id"]),
    }


def _uri(picture: np.ndarray, longest: int) -> str:
    """A picture, uint8 [rows, columns] or [rows, columns, 3], as JPEG within a data URI."""
    scale = longest / max(picture.shape[:2])
    if scale < 1:
        size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()
