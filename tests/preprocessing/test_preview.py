"""The gallery shows each picture with its crop's box, and says what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from preprocessing.convert import convert
from preprocessing.errors import InputError
from preprocessing.preview import draw_gallery
from preprocessing.settings import ConvertSettings
from tests.preprocessing.pictures import data_set


def test_the_sheet_draws_every_picture_and_its_box(tmp_path: Path) -> None:
    images, csv = data_set(tmp_path, 4)
    store = tmp_path / "store"
    convert(images, csv, store, ConvertSettings(levels=("64",)), workers=1)
    sheet = cv2.imread(str(draw_gallery(store, tmp_path / "made" / "crops.png", images)))
    assert sheet is not None
    cells = np.split(sheet, 4, axis=1)
    for cell in cells:
        boxed = (cell == (0, 210, 255)).all(axis=-1)
        assert boxed.sum() > 200, "each crop has a box"
        assert cell[boxed == 0].std() > 10, "and a picture under it"
    shutil.rmtree(images)
    with pytest.raises(InputError, match="the folder of source pictures is not there"):
        draw_gallery(store, tmp_path / "again.png", images)
