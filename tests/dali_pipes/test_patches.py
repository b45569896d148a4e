"""Patches of a large level: where they lie, and that they are cut out of it and nothing else."""

import io

import numpy as np
import pytest
import tifffile
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType

from dali_pipes.geometry import output_to_patch, seen_region
from dali_pipes.loader import Loader
from dali_pipes.pipelines import decode_region
from dali_pipes.plan import Draw, Plan
from dali_pipes.settings import AugmentSettings, ClaheSettings, LoaderSettings, PipelineSettings
from dali_pipes.source import Source
from dali_pipes.steps import HostSteps
from preprocessing.errors import ConfigError
from preprocessing.tiles import encode_level, read_level
from tests.dali_pipes.stores import make_store, smooth

CHANGED = AugmentSettings(grid=0.5, noise=0.0, blur=0.0, dropout=0.0)
PLAIN = PipelineSettings(height=48, width=64, patch_level="full", clahe=ClaheSettings(enabled=False), mean=0, std=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    sizes = ((300, 200), (120, 90), (40, 30))  # the last is smaller than a patch
    return make_store(tmp_path_factory.mktemp("patches") / "store", count=9, sizes=sizes)


def pictures(store, pipeline, train=False, **more):
    settings = LoaderSettings(batch_size=3, val_batch_size=3, threads=2, **more)
    with Loader(store, store.manifest, pipeline, settings, train=train) as loader:
        return torch.cat([batch["image"] for batch in loader.epoch(0)])


def full(store, row):
    return read_level(store.root / store.manifest["path_full"].iloc[row])


def test_a_patch_without_changes_is_cut_out_of_the_middle_pixel_for_pixel(store):
    found = pictures(store, PLAIN)
    for row in (0, 3, 6):
        level = full(store, row).astype(np.float64)
        level = level[:, ::-1] if store.manifest["laterality"].iloc[row] == "R" else level
        cut = np.clip((level[126:174, 68:132] - 2047.5) / 4095 + 0.5, 0, 1)
        assert np.abs(found[row, 0].numpy() - cut).max() < 1e-5


def test_a_level_smaller_than_the_patch_lies_in_its_middle(store):
    found = pictures(store, PLAIN)[2, 0].numpy()
    level = np.clip((full(store, 2).astype(np.float64) - 2047.5) / 4095 + 0.5, 0, 1)
    assert np.abs(found[4:44, 17:47] - level).max() < 1e-5
    assert np.isclose(found.sum(), found[4:44, 17:47].sum())


def test_a_level_smaller_than_the_patch_lies_there_wherever_the_draw_would_have_it():
    middle = output_to_patch(40, 300, 48, 64, Draw(patch_x=0.5), False)
    for draw, moved in ((Draw(patch_y=0.0), 0), (Draw(patch_y=1.0), 0), (Draw(patch_x=1.0), (300 - 64) / 2)):
        found = output_to_patch(40, 300, 48, 64, draw, False)
        assert np.allclose(found - middle, [[0, 0, moved], [0, 0, 0]])


@pytest.mark.parametrize("beside", [(-500, 0), (500, 0), (0, -500), (0, 500)])
def test_an_output_that_looks_beside_the_level_is_given_a_pixel_of_it(beside):
    matrix = np.array([[1.0, 0, beside[0]], [0, 1.0, beside[1]]])
    top, left, rows, columns = seen_region(matrix, 100, 80, 48, 64)
    assert rows >= 1
    assert columns >= 1
    assert 0 <= top <= 100 - rows
    assert 0 <= left <= 80 - columns


def test_patches_read_from_tiles_and_cache_are_the_same_bits(store):
    pipeline = PLAIN.model_copy(update={"augment": CHANGED})
    tiles = pictures(store, pipeline, True)
    assert torch.equal(tiles, pictures(store, pipeline, True, cache="host"))
    assert tiles.std(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize(("steps", "limit"), [(5, 0.25), (2, 0.45)])
def test_what_lies_outside_the_region_read_is_not_missed(store, steps, limit, monkeypatch):
    """A patch warped out of its region equals one warped out of the whole level, grid distortion included."""
    changed = AugmentSettings(grid=1.0, grid_steps=steps, grid_limit=limit, blur=0.0, noise=0.0)
    pipeline = PLAIN.model_copy(update={"augment": changed})
    plan = Plan([0.0] * 3, LoaderSettings(), 0, True, changed)
    source = Source(store, store.manifest, pipeline)
    run = HostSteps(pipeline)
    draws = [plan.sample(0, place) for place in range(100)]
    parts = [source.sample(0, draw)[0] for draw in draws]
    assert np.median([part.picture.size for part in parts]) < 300 * 200 / 4
    monkeypatch.setattr("dali_pipes.source.seen_region", lambda *_, **__: (0, 0, 300, 200))
    for draw, part in zip(draws, parts, strict=True):
        whole = source.sample(0, draw)[0]
        assert whole.picture.shape == (300, 200, 1)
        assert np.abs(run(*part).astype(np.float64) - run(*whole)).max() < 1e-3


def test_patches_come_from_all_over_the_level(store):
    places = [output_to_patch(300, 200, 48, 64, Draw(patch_x=u, patch_y=u), False)[:, 2] for u in (0, 0.5, 1)]
    assert np.allclose(places, [[0, 0], [68, 126], [136, 252]])


def test_a_level_that_the_store_lacks_is_named_at_once(store):
    lacking = PLAIN.model_copy(update={"patch_level": "4096"})
    with pytest.raises(ConfigError, match=r"patch_level = '4096'.*full, 128, 64"):
        Loader(store, store.manifest, lacking, LoaderSettings())


@pytest.mark.parametrize("codec", ["zstd", "deflate", "lzw"])
def test_of_a_large_level_the_tiles_that_a_region_touches_are_decoded_and_no_others(codec):
    """Every other tile is overwritten: whoever decodes one fails, or gives another picture."""
    level = smooth(1024, 1024, 0)
    encoded = np.frombuffer(encode_level(level, codec), np.uint8).copy()
    with tifffile.TiffFile(io.BytesIO(encoded.tobytes())) as tiff:
        page = tiff.pages.first
        for tile, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
            if tile not in (5, 6):  # of four in a row: those of columns 256 to 767 in rows 256 to 511
                encoded[offset : offset + count] = 255
    assert np.array_equal(decoded(encoded, (260, 300, 240, 400)), level[260:500, 300:700])
    with pytest.raises(RuntimeError):
        decoded(encoded, (0, 0, 1024, 1024))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("region", [(0, 0, 600, 700), (260, 300, 240, 400)])
@pytest.mark.parametrize("codec", ["zstd", "deflate", "lzw", "none", "htj2k"])
def test_mixed_decoding_gives_the_stored_values_of_every_codec(codec, region):
    level = smooth(600, 700, 0)
    top, left, rows, columns = region
    found = decoded(np.frombuffer(encode_level(level, codec), np.uint8), region, "mixed")
    assert np.array_equal(found, level[top : top + rows, left : left + columns])


def decoded(encoded, region, device="cpu"):
    """A region of a file, through DALI."""
    pipeline = Pipeline(1, 1, device_id=None if device == "cpu" else 0, exec_dynamic=True)
    where = np.array(region, np.int32)
    with pipeline:
        tile = fn.external_source(source=lambda: [encoded], batch=True, dtype=DALIDataType.UINT8, ndim=1)
        start = fn.external_source(source=lambda: [where], batch=True, dtype=DALIDataType.INT32, ndim=1)
        pipeline.set_outputs(decode_region(tile, start, device))
    pipeline.build()
    (output,) = pipeline.run()
    return np.array(output.as_cpu().at(0))[..., 0]
