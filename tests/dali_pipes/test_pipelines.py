"""The two forms of the steps, OpenCV's and DALI's, give the same pictures: on DALI's CPU backend here, on a GPU where
there is one."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType

from dali_pipes.cache import LevelCache
from dali_pipes.feed import Uses, feed
from dali_pipes.loader import Loader
from dali_pipes.operators import _whole_tiles
from dali_pipes.pipelines import halves, host_pipeline, operator_pipeline
from dali_pipes.plan import Plan
from dali_pipes.settings import AugmentSettings, ClaheSettings, LoaderSettings, PipelineSettings
from dali_pipes.source import Source, whole_tiles
from tests.dali_pipes.stores import make_store

CHANGES = ("hflip", "vflip", "affine", "window", "tone", "noise", "blur", "sharpen", "grid", "dropout", "grid_dropout")
SMALL = PipelineSettings(height=64, width=48)
NONE = dict.fromkeys(CHANGES, 0.0)
CASES = {
    "plain": PipelineSettings(augment=AugmentSettings(**NONE)),
    "no CLAHE": PipelineSettings(clahe=ClaheSettings(enabled=False), augment=AugmentSettings(**NONE)),
    "shrunk": PipelineSettings(height=32, width=32, augment=AugmentSettings(**NONE)),
    "three channels": PipelineSettings(channels=3, augment=AugmentSettings(**NONE)),
    **{name: PipelineSettings(augment=AugmentSettings(**NONE | {name: 1.0})) for name in CHANGES},
    "all": PipelineSettings(augment=AugmentSettings(**dict.fromkeys(CHANGES, 0.5))),
}


def windows(image):
    """Every kind of window in turn."""
    none = {f"window_{name}": [] for name in ("center", "width", "function")}
    lut = {"voi_lut": [int(4095 * (x / 4095) ** 0.7) for x in range(4096)], "voi_lut_first": 0, "voi_lut_bits": 12}
    return [{}, {"window_function": ["SIGMOID"]}, none, none | lut][image % 4]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("pipelines") / "store", count=8, change=windows)


def pictures(store, settings, device):
    """Two batches, in grey values of 0 to 255; device "operators" is DALI's own CPU backend."""
    if (settings.height, settings.width) == (512, 512):
        settings = settings.model_copy(update={"height": 64, "width": 48})
    if device == "operators":
        found = on_operators(store, settings, encoded=False)
    else:
        sampling = LoaderSettings(batch_size=4, threads=2)
        with Loader(store, store.manifest, settings, sampling, seed=3, device=device) as loader:
            found = torch.cat([batch["image"].cpu() for batch in loader.epoch(1)])
    return (found * settings.std + settings.mean) * 255


def on_operators(store, settings, encoded, train=True, cache=None):
    """What `Loader` gives, from the graph of operators on DALI's CPU backend: two batches."""
    plan = Plan(
        store.manifest["cancer"].to_numpy(np.float32),
        LoaderSettings(batch_size=4, val_batch_size=4),
        seed=3,
        train=train,
        augment=settings.augment,
    )
    uses = Uses.of(store.manifest.to_dict("records"), settings, plan.augment, encoded)
    source = Source(store, store.manifest, settings, cache=cache, encoded=encoded, whole=not encoded)
    order = plan.order(1)
    fed = []
    for step in range(2):
        samples = [source.sample(int(order[place]), plan.sample(1, int(place)))[0] for place in plan.places(step)]
        fed.append(feed(samples, uses, settings))
    waiting = iter(fed)
    graph = operator_pipeline(lambda: next(waiting), settings, uses, 4, 2, 2, None, decoded=not encoded)
    return torch.cat([torch.from_dlpack(graph.run()[0].as_tensor()).clone() for _ in range(2)])


def agree(store, settings, device):
    host, other = pictures(store, settings, "cpu"), pictures(store, settings, device)
    difference = (host - other).abs()
    assert host.shape == other.shape
    assert difference.mean() <= 1
    return float(difference.mean()), float(difference.max())


@pytest.mark.parametrize("case", CASES)
def test_opencv_and_dalis_cpu_operators_agree(store, case):
    mean, most = agree(store, CASES[case], "operators")
    assert mean < 0.05
    assert most < 4


@pytest.mark.parametrize("case", ["plain", "no CLAHE", "window"])
@pytest.mark.parametrize("kinds", [(0,), (0, 1), (0, 2), (0, 3), (1, 3)])
def test_each_mixture_of_windows_agrees(tmp_path, case, kinds):
    chosen = make_store(tmp_path / "store", count=8, change=lambda image: windows(kinds[image % len(kinds)]))
    mean, most = agree(chosen, CASES[case], "operators")
    assert mean < 0.05
    assert most < 4


def test_a_graph_without_the_steps_that_no_sample_takes_gives_what_one_with_all_of_them_gives(tmp_path, monkeypatch):
    plain = make_store(tmp_path / "store", count=8)  # ramps alone
    for settings in (CASES["plain"], CASES["no CLAHE"], CASES["tone"]):
        small = settings.model_copy(update={"height": 64, "width": 48})
        few = on_operators(plain, small, encoded=False)
        with monkeypatch.context() as patched:
            patched.setattr(Uses, "of", lambda *_: Uses())
            every = on_operators(plain, small, encoded=False)
        # Rounding to CLAHE's bytes, which one operator does where all windows are ramps, may turn out one grey apart.
        assert ((few - every).abs() * settings.std * 255).mean() < 0.02


def test_what_no_sample_takes_is_known_from_the_settings_and_the_files():
    ramp, sigmoid = {"voi_lut": [], "window_function": ["LINEAR"]}, {"voi_lut": [], "window_function": ["SIGMOID"]}
    table = {"voi_lut": [0, 1], "window_function": []}
    none = Uses(False, False, False, True, *[False] * 6)
    assert Uses.of([ramp], SMALL, None, encoded=True) == none
    for odd, names in (
        (sigmoid, {"sigmoids"}),
        (table, {"tables"}),
        (sigmoid | {"voi_lut": [0]}, {"sigmoids", "tables"}),
    ):
        assert Uses.of([ramp, odd], SMALL, None, encoded=True) == replace(none, **dict.fromkeys(names, True))
        assert Uses.of([odd], SMALL.model_copy(update={"window": "fixed"}), None, encoded=True) == none
    patches = SMALL.model_copy(update={"patch_level": "full"})
    assert [Uses.of([ramp], patches, None, encoded).regions for encoded in (True, False)] == [True, False]
    steps = {"tone": "tone", "grid": "grid", "blur": "blur", "sharpen": "sharpen", "noise": "noise"}
    for step, setting in (*steps.items(), ("holes", "dropout"), ("holes", "grid_dropout")):
        augment = AugmentSettings(**NONE | {setting: 0.1})
        assert Uses.of([ramp], SMALL, augment, encoded=True) == replace(none, **{step: True})


@pytest.mark.parametrize("codec", ["zstd", "deflate", "lzw", "none", "htj2k"])
def test_the_graphs_own_decoders_give_the_bits_of_the_hosts(tmp_path, codec):
    store = make_store(tmp_path / "store", count=8, codec=codec)
    for settings in (SMALL, SMALL.model_copy(update={"patch_level": "full"})):
        encoded, decoded = (on_operators(store, settings, encoded, train=False) for encoded in (True, False))
        assert torch.equal(encoded, decoded)
        assert torch.equal(on_operators(store, settings, False, train=False, cache=LevelCache(1 << 20)), decoded)
        assert encoded.std(dim=(1, 2, 3)).min() > 0.1


@pytest.mark.parametrize("order", ["pictures first", "arguments first", "in turns"])
def test_pictures_and_arguments_stay_together_in_whatever_order_they_are_asked_for(order):
    batches = iter([[f"picture {n}", f"numbers {n}", f"matrix {n}"] for n in range(4)])
    pictures, arguments = halves(lambda: next(batches))
    found = []
    for n in range(4):
        first = order == "pictures first" or (order == "in turns" and n % 2)
        pair = (pictures(), arguments()) if first else (arguments(), pictures())[::-1]
        found.append(pair)
    assert found == [(f"picture {n}", [f"numbers {n}", f"matrix {n}"]) for n in range(4)]
    for each in (pictures, arguments):
        with pytest.raises(StopIteration):
            each()


def test_dali_takes_the_two_halves():
    batches = iter([[[np.full((4, 3, 1), n, np.int16)], [np.float32([n])], [np.float32([[n]])]] for n in range(3)])
    pictures, arguments = halves(lambda: next(batches))
    pipeline = Pipeline(1, 1, device_id=None, exec_dynamic=True)
    with pipeline:
        tile = fn.external_source(source=pictures, batch=True, dtype=DALIDataType.INT16, ndim=3, layout="HWC")
        others = fn.external_source(source=arguments, num_outputs=2, batch=True, dtype=DALIDataType.FLOAT, ndim=[1, 2])
        pipeline.set_outputs(tile, *others)
    pipeline.build()
    for n in range(3):
        assert {float(np.array(output.at(0)).max()) for output in pipeline.run()} == {n}
    with pytest.raises(StopIteration):
        pipeline.run()


@pytest.mark.parametrize("shape", [(64, 64), (64, 70), (65, 64), (100, 77), (5, 90), (1, 3)])
def test_mirrored_to_whole_tiles_clahe_gives_what_opencv_gives_on_the_picture_itself(shape):
    levels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    whole = _whole_tiles(8)(torch.from_numpy(levels)[..., None]).numpy()[..., 0]
    for picture in (levels[..., None], torch.from_numpy(levels)[..., None]):
        assert np.array_equal(np.asarray(whole_tiles(picture, 8))[..., 0], whole)
    assert not any(side % 8 for side in whole.shape)
    equaliser = cv2.createCLAHE(2.0, (8, 8))
    assert np.array_equal(equaliser.apply(whole)[: shape[0], : shape[1]], equaliser.apply(levels))


@pytest.mark.parametrize("channels", [1, 3])
def test_normalising_is_minus_mean_over_std(channels):
    picture = np.random.default_rng(0).random((80, 60, 1), np.float32)
    settings = PipelineSettings(channels=channels, mean=0.3, std=0.2)
    graph = host_pipeline(lambda: [picture], settings, 1, 1, 1)
    found = np.array(graph.run()[0].at(0))
    assert found.shape == (channels, 80, 60)
    assert np.abs(found - (picture[None, ..., 0] - 0.3) / 0.2).max() < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", CASES)
def test_cpu_and_gpu_agree(store, case):
    agree(store, CASES[case], "cuda")
