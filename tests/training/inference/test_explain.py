"""Maps and boxes lie where the source's pixels are, whatever crop, level, mirror and padding came between."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from dali_pipes.settings import PipelineSettings
from preprocessing.convert import convert
from preprocessing.manifest import open_store
from preprocessing.settings import ConvertSettings
from training.config import load_config
from training.inference import explain as explanation
from training.inference.ensemble import Ensemble, Group, Member
from training.model import build_model

ROW = {
    "source_rows": 1000, "source_columns": 800, "crop_top": 100, "crop_left": 60, "crop_height": 600,
    "crop_width": 300, "height_200": 200, "width_200": 100, "laterality": "L",
}  # fmt: skip
SPOT = (330, 250)  # row and column of the source


@pytest.mark.parametrize(("laterality", "orient"), [("L", True), ("R", True), ("R", False)])
def test_a_source_point_lands_where_fit_padding_and_mirror_put_it(laterality: str, orient: bool):
    pipeline = PipelineSettings(height=128, width=160, orient=orient)
    matrix, size = explanation.canvas_to_tensor(ROW | {"laterality": laterality}, ("200",), pipeline)
    assert size == (1000, 800)
    row, column = SPOT
    down, right = (row - 100) / 600, (column - 60) / 300
    if laterality == "R" and orient:
        right = 1 - right
    # 600 x 300 fits into 128 x 160 as 128 x 64, 48 columns of padding on either side
    expected = 48 + 64 * right, 128 * down
    np.testing.assert_allclose(matrix @ [column, row, 1], expected, atol=1e-9)


def test_large_sources_are_written_smaller_and_their_boxes_are_not():
    row = ROW | {"source_rows": 3200, "source_columns": 2400}
    matrix, size = explanation.canvas_to_tensor(row, ("200",), PipelineSettings(height=128, width=160))
    assert size == (1600, 1200)
    full, _ = explanation.canvas_to_tensor(
        row | {"source_rows": 1600, "source_columns": 1200}, ("200",), PipelineSettings(height=128, width=160)
    )
    np.testing.assert_allclose(matrix @ [125, 165, 1], full @ [250, 330, 1], atol=1e-9)
    heat = np.zeros((1600, 1200), np.float32)
    heat[100:150, 200:220] = 1
    assert explanation.regions(heat, 0.5) == [explanation.Region(200, 400, 100, 40, 1.0)]


def test_regions_are_the_hot_places_hottest_first():
    heat = np.zeros((60, 80), np.float32)
    heat[5:15, 10:30] = 0.6
    heat[40:44, 50:53] = 1.0
    heat[20:30, 60:70] = 0.4
    found = explanation.regions(heat, 1.0, share=0.5)
    assert [(r.top, r.left, r.height, r.width) for r in found] == [(40, 50, 4, 3), (5, 10, 10, 20)]
    assert [r.score for r in found] == pytest.approx([1.0, 0.6])
    assert explanation.regions(np.zeros((5, 5), np.float32), 1.0) == []


def test_a_regions_score_is_its_own_where_another_lies_inside_its_box():
    heat = np.zeros((40, 40), np.float32)
    heat[5:30, 5:8] = heat[27:30, 5:30] = 0.6  # an angle
    heat[10:13, 20:24] = 1.0
    found = explanation.regions(heat, 1.0)
    assert [(r.top, r.left, r.height, r.width) for r in found] == [(10, 20, 3, 4), (5, 5, 25, 25)]
    assert [r.score for r in found] == pytest.approx([1.0, 0.6])


def test_a_tensor_is_laid_back_by_its_pixels_centres():
    ramp = np.tile(np.arange(8, dtype=np.float32), (8, 1))
    found = explanation._laid_back(ramp, np.array([[0.5, 0, 0], [0, 0.5, 0]]), (16, 16))
    centres = (np.arange(1, 15) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(found[1:15, 1:15], np.tile(centres, (14, 1)), atol=1e-6)


def test_grad_cam_is_the_class_activation_map_where_the_pooling_is_the_average():
    torch.manual_seed(0)
    settings = load_config(None, ("model.backbone=test_efficientnet", "model.weights=none", "model.pooling=avg")).model
    model = build_model(settings, 1).eval()
    image = torch.randn(2, 1, 64, 64)
    found = explanation._map(model, image, "gradcam").numpy()
    with torch.no_grad():
        evidence = torch.einsum("bfhw,f->bhw", model.forward_features(image), model.head.weight[0]).relu().numpy()
    for ours, closed in zip(found, evidence, strict=True):
        expected = cv2.resize(closed, (64, 64))
        assert np.corrcoef(ours.ravel(), expected.ravel())[0, 1] > 0.99


def test_attention_spread_evenly_shows_nothing_and_a_clear_peak_shows_fully():
    even = torch.full((8, 8), 1 / 64)
    peak = even.clone()
    peak[2, 3] = 8 / 64
    faint = even.clone()
    faint[2, 3] = 2 / 64
    found = explanation._scaled(torch.stack([even, peak, faint]), "attention")
    assert found[0].max() == 0
    assert found[1, 2, 3] == 1
    assert found[2, 2, 3] == pytest.approx(1 / 3)  # (2 - 1) / (4 - 1)
    assert found.count_nonzero() == 2


class _Brightness(nn.Module):
    """Looks where it is bright."""

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"attention": nn.functional.avg_pool2d(x, 2)[:, 0].sub(0.8 * x.max()).relu()}


def _mammogram(laterality: str, row: int, column: int) -> np.ndarray:
    """uint8 [1000, 800]: a grey breast at its wall, with one bright spot."""
    rows, columns = np.mgrid[:1000, :800]
    wall = 0 if laterality == "L" else 799
    breast = ((rows - 480) / 330) ** 2 + ((columns - wall) / 420) ** 2 < 1
    picture = np.where(breast, 90, 0).astype(np.uint8)
    picture[row - 15 : row + 15, column - 15 : column + 15] = 255
    return picture


class _Everywhere(nn.Module):
    """Looks at everything alike."""

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        cells = nn.functional.avg_pool2d(x, 2)[:, 0]
        return {"attention": torch.full_like(cells, 1 / cells[0].numel())}


def test_pictures_at_the_threshold_are_explained_by_the_mean_over_the_folds(tmp_path: Path):
    (tmp_path / "images").mkdir()
    names = ["a", "b", "c", "d"]
    for name in names:
        cv2.imwrite(str(tmp_path / "images" / f"{name}.png"), _mammogram("L", *SPOT))
    table = pd.DataFrame({"patient_id": names, "image_id": names, "laterality": "L"})
    table.assign(file=table["image_id"] + ".png").to_csv(tmp_path / "t.csv", index=False)
    settings = ConvertSettings(levels=("256",))
    convert(tmp_path / "images", tmp_path / "t.csv", tmp_path / "store", settings, workers=1)
    store = open_store(tmp_path / "store")
    config = load_config(None, ("pipeline.height=160", "pipeline.width=160", "pipeline.clahe.enabled=false"))
    models = (_Brightness(), _Everywhere())
    members = tuple(Member(0, "", model, torch.float32, False) for model in models)  # type: ignore[arg-type]
    group = Group(config.pipeline, config.data.loader, members)
    ensemble = Ensemble(("run",), (group,), np.ones(1), ("mean",), 0.1, 0.5, settings, torch.device("cpu"))
    predictions = np.array([np.nan, 0.5, 0.4999, 0.9])
    written = explanation.explain(ensemble, store, store.manifest, predictions, tmp_path / "out", 0.5, share=0.3)
    assert [path.stem for path in written] == ["b", "d"]
    said = [json.loads(path.with_suffix(".json").read_text()) for path in written]
    assert [each["prediction"] for each in said] == [0.5, 0.9]
    for each in said:  # one fold saw the spot alone, the other nothing in particular
        (region,) = each["regions"]
        assert region["score"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("patch_level", [None, "full"], ids=["whole", "patch"])
@pytest.mark.parametrize("laterality", ["L", "R"])
def test_the_box_of_what_was_seen_covers_it_in_the_source(laterality: str, patch_level: str | None, tmp_path: Path):
    row, column = SPOT if laterality == "L" else (SPOT[0], 799 - SPOT[1])
    picture = _mammogram(laterality, row, column)
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "one.png"), picture)
    table = pd.DataFrame({"patient_id": ["p"], "image_id": ["one"], "laterality": [laterality], "file": ["one.png"]})
    table.to_csv(tmp_path / "one.csv", index=False)
    settings = ConvertSettings(levels=("full", "256"))
    convert(tmp_path / "images", tmp_path / "one.csv", tmp_path / "store", settings, workers=1)
    store = open_store(tmp_path / "store")
    # A patch is taken from the middle of the crop, which the bright spot lies in.
    size = 160 if patch_level is None else 480
    shape = (f"pipeline.height={size}", f"pipeline.width={size}", f"pipeline.patch_level={patch_level or 'null'}")
    config = load_config(None, (*shape, "pipeline.clahe.enabled=false"))
    member = Member(0, "", _Brightness(), torch.float32, False)  # type: ignore[arg-type]
    group = Group(config.pipeline, config.data.loader, (member,))
    ensemble = Ensemble(("run",), (group,), np.ones(1), ("mean",), 0.1, 0.5, settings, torch.device("cpu"))
    assert explanation.explain(ensemble, store, store.manifest, np.array([0.4]), tmp_path / "no", 0.5) == []
    (path,) = explanation.explain(ensemble, store, store.manifest, np.array([0.7]), tmp_path / "out", 0.5)
    written = cv2.imread(str(path))
    assert written.shape == (1000, 1600, 3)
    said = json.loads(path.with_suffix(".json").read_text())
    assert (said["image_id"], said["prediction"], said["scale"]) == ("one", 0.7, 1.0)
    (box,) = said["regions"]
    assert abs(box["top"] + box["height"] / 2 - row) < 8
    assert abs(box["left"] + box["width"] / 2 - column) < 8
    assert 15 < box["height"] < 60
    gray = written[:, :800, 0]
    assert gray[row, column] > 200
    assert abs(int(gray[480, 200 if laterality == "L" else 599]) - 90) < 5
    if patch_level is not None:
        assert gray[200].max() == 0  # of the crop, but not of the patch
    assert gray[5:50].max() == 0
