"""The two forms of the steps, OpenCV's and DALI's, give the same pictures: on DALI's CPU backend here, on a GPU where
there is one."""

from unittest import mock

import pytest
import torch

from dali_pipes.loader import Loader
from dali_pipes.pipelines import host_pipeline, operator_pipeline
from dali_pipes.settings import AugmentSettings, ClaheSettings, LoaderSettings, PipelineSettings
from tests.dali_pipes.stores import make_store

CHANGES = ("hflip", "vflip", "affine", "window", "tone", "noise", "blur", "sharpen", "grid", "dropout", "grid_dropout")
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
    loader = Loader(
        store,
        store.manifest,
        settings,
        LoaderSettings(batch_size=4, threads=2),
        seed=3,
        device="cuda" if device == "gpu" else "cpu",
    )
    with (
        loader,
        mock.patch("dali_pipes.loader.host_pipeline", on_operators if device == "operators" else host_pipeline),
    ):
        found = torch.cat([batch["image"].cpu() for batch in loader.epoch(1)])
    return (found * settings.std + settings.mean) * 255


def on_operators(source, settings, batch_size, threads, prefetch, _pool):
    """In the place of `host_pipeline`."""
    return operator_pipeline(source, settings, batch_size, threads, prefetch, None, decoded=True)


def agree(store, settings, device):
    host, other = pictures(store, settings, "host"), pictures(store, settings, device)
    difference = (host - other).abs()
    assert host.shape == other.shape
    assert difference.mean() <= 1
    return float(difference.mean()), float(difference.max())


@pytest.mark.parametrize("case", CASES)
def test_opencv_and_dalis_cpu_operators_agree(store, case):
    mean, most = agree(store, CASES[case], "operators")
    assert mean < 0.05
    assert most < 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", CASES)
def test_cpu_and_gpu_agree(store, case):
    agree(store, CASES[case], "gpu")
