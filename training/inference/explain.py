"""Where a model looked: maps in source pixels, as pictures for people and as boxes for programs.

For each picture over a threshold, `<image_id>.png` is the windowed picture as the models saw it, laid back onto the
source's pixel grid, beside itself under a heat map, and `<image_id>.json` has the boxes of the hottest regions in
source pixels. A map is the mean over the folds, each scaled to [0, 1]: `attention` says where the pooling looked,
whatever it found there; `gradcam` (Selvaraju et al. 2017) which places raised the probability of cancer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dali_pipes.geometry import level_of, output_to_tile, tile_size
from dali_pipes.plan import Draw
from dali_pipes.settings import PipelineSettings
from preprocessing.files import write_atomically
from preprocessing.ingest import safe_name
from preprocessing.manifest import Store
from training import run_files
from training.inference.ensemble import Ensemble, Group
from training.model import MammoModel

Method = Literal["attention", "gradcam"]
LONGEST_SIDE = 1600  # of the pictures written, in pixels; the tensors hold no more detail
MOST_REGIONS = 10
CLEAR = 4.0  # times the even share that attention must reach to count as clear


@dataclass(frozen=True)
class Region:
    """A hot region: its box in source pixels, and the highest value of the map in it, 0 to 1."""

    top: int
    left: int
    height: int
    width: int
    score: float


def explain(
    ensemble: Ensemble,
    store: Store,
    rows: pd.DataFrame,
    predictions: NDArray[np.float64],
    out: Path,
    threshold: float = 0.5,
    method: Method = "attention",
    share: float = 0.5,
) -> list[Path]:
    """Write a picture and a JSON for every row at or above a threshold.

    Args:
        ensemble: the models; those of the first run's tensors are explained.
        store: where the rows' tiles are.
        rows: of its manifest.
        predictions: float64 [rows], NaN where there is none.
        out: folder to write to; made.
        threshold: of the predictions.
        method: which map.
        share: a region is where the map, in [0, 1], reaches this value.

    Returns:
        The pictures written.
    """
    chosen = np.flatnonzero(np.nan_to_num(predictions, nan=-1.0) >= threshold)
    part = rows.iloc[chosen].reset_index(drop=True)
    group = ensemble.groups[0]
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for index, image, heat in _maps(ensemble, group, store, part, method):
        row: dict[str, Any] = {str(name): value for name, value in part.iloc[index].items()}
        matrix, size = canvas_to_tensor(row, store.levels, group.pipeline)
        hot = _laid_back(heat, matrix, size)
        path = out / f"{safe_name(str(row['image_id']))}.png"
        write_atomically(path, overlay(_laid_back(image, matrix, size), hot))
        scale = size[0] / int(row["source_rows"])
        described = {
            "image_id": row["image_id"],
            "prediction_id": row["prediction_id"],
            "prediction": float(predictions[chosen[index]]),
            "method": method,
            "source_rows": int(row["source_rows"]),
            "source_columns": int(row["source_columns"]),
            "scale": scale,  # of the picture beside it
            "regions": [asdict(region) for region in regions(hot, scale, share)],
        }
        run_files.write_json(path.with_suffix(".json"), described)
        written.append(path)
    return written


def canvas_to_tensor(
    row: Mapping[str, Any], levels: tuple[str, ...], pipeline: PipelineSettings
) -> tuple[NDArray[np.float64], tuple[int, int]]:
    """How the picture that is written lies on the tensors.

    Returns:
        The affine map, float64 [2, 3], from pixels of the canvas to those of the tensor (pixel i covers [i, i + 1)),
        and the canvas's rows and columns: the source's own, scaled down to `LONGEST_SIDE`.
    """
    source = int(row["source_rows"]), int(row["source_columns"])
    scale = min(1.0, LONGEST_SIDE / max(source))
    size = round(source[0] * scale), round(source[1] * scale)
    crop = int(row["crop_height"]), int(row["crop_width"])
    level = level_of(row, levels, pipeline)
    height, width = tile_size(row, level)
    to_tile = _square(output_to_tile(row, level, pipeline, Draw()))
    down, right = height / crop[0], width / crop[1]
    from_source = np.array(
        [[right, 0, -right * int(row["crop_left"])], [0, down, -down * int(row["crop_top"])], [0, 0, 1]]
    )
    from_canvas = np.diag([source[1] / size[1], source[0] / size[0], 1])
    matrix = np.linalg.inv(to_tile) @ from_source @ from_canvas
    return matrix[:2].astype(np.float64), size


def regions(heat: NDArray[np.float32], scale: float, share: float = 0.5) -> list[Region]:
    """The connected places where a map reaches a value, the hottest first, ten at most.

    Args:
        heat: float32 [rows, columns] in [0, 1].
        scale: of the map's pixels to the source's.
        share: that value.
    """
    hot = (heat >= share).astype(np.uint8)
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(hot, connectivity=8)
    found = []
    for label in range(1, count):
        left, top, width, height, _ = (int(value) for value in boxes[label])
        inside = heat[top : top + height, left : left + width][labels[top : top + height, left : left + width] == label]
        box = (round(value / scale) for value in (top, left, height, width))
        found.append(Region(*box, score=float(inside.max())))
    return sorted(found, key=lambda region: -region.score)[:MOST_REGIONS]


def overlay(image: NDArray[np.float32], heat: NDArray[np.float32]) -> bytes:
    """The picture, and beside it the picture under its heat map, as PNG; both float32 [rows, columns] in [0, 1]."""
    gray = np.repeat((np.clip(image, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)
    colours = cv2.applyColorMap((np.clip(heat, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    opacity = (0.65 * np.sqrt(np.clip(heat, 0, 1)))[..., None]
    blended = gray * (1 - opacity) + colours * opacity
    done, encoded = cv2.imencode(".png", np.hstack([gray, blended.astype(np.uint8)]))
    if not done:
        raise RuntimeError("OpenCV did not encode the overlay as PNG")
    return encoded.tobytes()


def _maps(
    ensemble: Ensemble, group: Group, store: Store, rows: pd.DataFrame, method: Method
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
    """Each row's position, its tensor as grey in [0, 1], and its map, both float32 [height, width]."""
    from dali_pipes.loader import Loader

    if not len(rows):
        return
    pipeline = group.pipeline
    device = str(ensemble.device)
    with Loader(store, rows, pipeline, group.loader, train=False, device=device) as loader:
        for batch in loader.epoch(0):
            image = batch["image"].to(ensemble.device)
            found = [_scaled(_map(cast(MammoModel, member.model), image, method), method) for member in group.members]
            heat = torch.stack(found).mean(dim=0).cpu().numpy()
            gray = (image[:, 0].float() * pipeline.std + pipeline.mean).cpu().numpy()
            for place, index in enumerate(batch["index"].tolist()):
                size = (pipeline.width, pipeline.height)
                hot = cv2.resize(heat[place].astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
                yield index, gray[place], np.asarray(hot, np.float32)


def _map(model: MammoModel, image: Tensor, method: Method) -> Tensor:
    """A map, float32 [B, h, w], not negative."""
    if method == "attention":
        with torch.inference_mode():
            return model.outputs(image)["attention"].float()
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    tapped = _Tapped(model)
    with torch.enable_grad(), GradCAM(model=tapped, target_layers=[tapped.tap]) as cam:
        targets: list[nn.Module] = [ClassifierOutputTarget(0)] * len(image)  # pyright: ignore[reportAssignmentType]
        return torch.from_numpy(np.asarray(cam(input_tensor=image, targets=targets), np.float32)).to(image.device)


class _Tapped(nn.Module):
    """The model with its feature map passing through a module of its own, where Grad-CAM can listen; logits [B, 1]."""

    def __init__(self, model: MammoModel) -> None:
        super().__init__()
        self.model, self.tap = model, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pooled, _ = self.model.pool(self.tap(self.model.forward_features(x)))
        return self.model.head(pooled)


def _scaled(maps: Tensor, method: Method) -> Tensor:
    """Each map [B, h, w] in [0, 1].

    Attention is what goes beyond an even spread, 1 at its peak where that has `CLEAR` times the even share or more: a
    model that looks everywhere alike gives an empty map, not its noise blown up.
    """
    if method == "gradcam":
        return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    ratio = maps * maps[0].numel()
    peak = ratio.amax(dim=(1, 2), keepdim=True).clamp(min=CLEAR)
    return ((ratio - 1) / (peak - 1)).clamp(min=0)


def _laid_back(tensor: NDArray[np.float32], matrix: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float32]:
    """A tensor's plane on the canvas; 0 where the tensor does not reach."""
    index = matrix.copy()  # OpenCV's pixel i is centred on i, ours on i + 1/2
    index[:, 2] += matrix[:, :2].sum(axis=1) / 2 - 0.5
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    plane = np.ascontiguousarray(tensor, np.float32)
    return np.asarray(cv2.warpAffine(plane, index, size[::-1], flags=flags), np.float32)


def _square(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([matrix, [[0.0, 0.0, 1.0]]])
