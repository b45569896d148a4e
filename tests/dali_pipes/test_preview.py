import cv2
import numpy as np
import pytest

from dali_pipes.preview import draw_sheet
from dali_pipes.settings import PipelineSettings
from preprocessing.errors import StoreError
from tests.dali_pipes.stores import flipped, make_store

SMALL = PipelineSettings(height=64, width=64)


def test_the_sheet_shows_each_original_beside_its_variants(tmp_path):
    store = make_store(tmp_path / "store", count=8)
    sheet = cv2.imread(str(draw_sheet(store, tmp_path / "sheet.png", SMALL, images=3, variants=4)), 0)
    rows, columns = sheet.shape[0] // 3, sheet.shape[1] // 5
    cells = [[sheet[r * rows :, c * columns :][:320, :320].astype(int) for c in range(5)] for r in range(3)]
    assert all(cell.std() > 20 for line in cells for cell in line)
    for line in cells:
        assert all(np.abs(line[0] - variant).mean() > 2 for variant in line[1:])
    again = cv2.imread(str(draw_sheet(store, tmp_path / "again.png", SMALL, images=3, variants=4)), 0)
    assert np.array_equal(sheet, again)


@pytest.mark.parametrize(("cancer", "asked", "shown"), [(0.0, 1, 1), (0.0, 5, 3), (1.0, 2, 2)])
def test_no_picture_is_shown_twice_and_one_class_alone_will_do(tmp_path, cancer, asked, shown):
    store = make_store(tmp_path / "store", count=3, change=lambda image: {"cancer": cancer})
    sheets = [
        cv2.imread(str(draw_sheet(store, tmp_path / "sheet.png", SMALL, images=n, variants=1)), 0) for n in (1, asked)
    ]
    assert sheets[1].shape[0] == shown * sheets[0].shape[0]


def test_a_damaged_picture_is_named(tmp_path):
    store = make_store(tmp_path / "store", count=1)
    path = store.root / store.manifest["path_64"].iloc[0]
    flipped(path, 100)
    with pytest.raises(StoreError, match=str(path)):
        draw_sheet(store, tmp_path / "sheet.png", SMALL)
