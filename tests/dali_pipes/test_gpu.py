"""The loader on a GPU. Skipped where there is none."""

import numpy as np
import pytest
import torch

from dali_pipes.loader import Loader
from dali_pipes.settings import AugmentSettings, ClaheSettings, LoaderSettings, PipelineSettings
from preprocessing.manifest import level_column
from tests.dali_pipes.stores import flipped, make_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU here"),
]
AUGMENT = AugmentSettings(vflip=0.5, noise=0.5, blur=0.5, sharpen=0.5, grid=0.5, dropout=0.5, grid_dropout=0.3)
PIPELINE = PipelineSettings(height=64, width=48, augment=AUGMENT)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("gpu") / "store")


def batches(store, train=True, epoch=2, start=0, pipeline=PIPELINE, device="cuda", **more):
    settings = LoaderSettings(**{"batch_size": 4, "val_batch_size": 4, "threads": 4} | more)
    with Loader(store, store.manifest, pipeline, settings, seed=5, train=train, device=device) as loader:
        return list(loader.epoch(epoch, start))


def joined(found, name="image"):
    return torch.cat([batch[name] for batch in found])


def test_a_batch_is_on_the_gpu_and_close_to_the_hosts(store):
    for train in (True, False):
        here, there = batches(store, train), batches(store, train, device="cpu")
        assert all(value.is_cuda for value in here[0].values())
        for name in ("label", "index", "ok"):
            assert torch.equal(joined(here, name).cpu(), joined(there, name))
        difference = (joined(here).cpu() - joined(there)).abs() * PIPELINE.std * 255
        assert difference.mean() < 1


@pytest.mark.parametrize("train", [False, True])
def test_steps_on_the_host_give_a_gpu_what_they_give_the_host(store, train):
    here, there = batches(store, train, steps_on="cpu", cache="host"), batches(store, train, device="cpu")
    assert all(value.is_cuda for value in here[0].values())
    for name in ("label", "index", "ok"):
        assert torch.equal(joined(here, name).cpu(), joined(there, name))
    torch.testing.assert_close(joined(here).cpu(), joined(there), rtol=0, atol=1e-5)


@pytest.mark.parametrize("codec", ["zstd", "deflate", "lzw", "none", "htj2k"])
@pytest.mark.parametrize("patch", [False, True])
def test_every_cache_and_codec_gives_the_same_bits(store, tmp_path, codec, patch):
    pipeline = PIPELINE.model_copy(update={"patch_level": "full"}) if patch else PIPELINE
    expected = joined(batches(store, pipeline=pipeline))
    assert expected.std(dim=(1, 2, 3)).min() > 0.1
    other = make_store(tmp_path / "store", codec=codec)
    for cache in ("none", "host", "device"):
        assert torch.equal(joined(batches(other, pipeline=pipeline, cache=cache)), expected), cache


def test_a_second_epoch_from_the_device_cache_reads_no_tile(store, tmp_path):
    other = make_store(tmp_path / "store")
    settings = LoaderSettings(batch_size=4, threads=4, cache="device", sampling="natural")
    with Loader(other, other.manifest, PIPELINE, settings, seed=5, device="cuda") as loader:
        first = joined(list(loader.epoch(0)), "index")
        for path in other.root.rglob("*.tif"):
            path.unlink()
        assert joined(list(loader.epoch(1)), "ok").all()
        assert loader.cache.hits == len(first)


def test_the_stream_is_the_same_for_any_batch_size_and_after_a_restart(store):
    whole = batches(store, epoch_samples=28)
    assert torch.equal(joined(whole), joined(batches(store, epoch_samples=28, batch_size=7, threads=2)))
    assert torch.equal(joined(whole[3:]), joined(batches(store, epoch_samples=28, start=3)))


@pytest.mark.parametrize("steps_on", ["auto", "cpu"])
def test_batches_stay_as_they_are_when_later_ones_come(store, steps_on):
    settings = LoaderSettings(batch_size=2, steps_on=steps_on)
    with Loader(store, store.manifest, PIPELINE, settings, seed=5, device="cuda") as loader:
        kept = [(batch["image"], batch["image"].clone()) for epoch in range(3) for batch in loader.epoch(epoch)]
    assert all(torch.equal(a, b) for a, b in kept)


@pytest.mark.parametrize("steps_on", ["auto", "cpu"])
def test_a_batch_stays_as_it_is_for_what_is_queued_on_it(store, steps_on):
    """Here training is far behind the host, which has let go of the batch long ago."""
    expected = [batch["image"] for batch in batches(store, batch_size=2, steps_on=steps_on)]
    settings = LoaderSettings(batch_size=2, steps_on=steps_on)
    with Loader(store, store.manifest, PIPELINE, settings, seed=5, device="cuda") as loader:
        copies = []
        for batch in loader.epoch(2):
            torch.cuda._sleep(200_000_000)
            copies.append(batch["image"].clone())
            del batch
    assert all(torch.equal(a, b) for a, b in zip(copies, expected, strict=True))


def test_levels_are_uploaded_for_the_device_cache_without_waiting_for_training(store):
    settings = LoaderSettings(batch_size=2, cache="device", sampling="natural")

    def opened():
        return Loader(store, store.manifest, PIPELINE, settings, seed=5, device="cuda")

    with opened() as loader:  # kernels are loaded when they are first used, which waits for the GPU
        list(loader.epoch(0))
    with opened() as loader:
        running = loader.epoch(0)
        next(running)
        before = loader.cache.misses
        torch.cuda._sleep(8_000_000_000)
        behind = torch.cuda.current_stream().record_event()
        taken = [next(running) for _ in range(5)]
        assert loader.cache.misses > before
        assert not behind.query()
        assert all(batch["image"].isfinite().all() for batch in taken)


@pytest.mark.parametrize(
    ("cache", "steps_on"), [*((each, "auto") for each in ("none", "host", "device")), ("none", "cpu")]
)
def test_a_damaged_tile_costs_its_sample_alone(tmp_path, cache, steps_on):
    other = make_store(tmp_path / "store", count=8)
    sound = joined(batches(other, train=False, cache=cache, steps_on=steps_on))
    flipped(other.root / other.manifest[level_column("path", "64")].iloc[2], bit=4000)
    found = batches(other, train=False, cache=cache, steps_on=steps_on)
    ok = joined(found, "ok").cpu().numpy()
    assert np.flatnonzero(~ok).tolist() == [2]
    assert torch.equal(joined(found)[torch.from_numpy(ok)], sound[torch.from_numpy(ok)])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_taking_a_batch_waits_for_nothing_on_the_gpu(store):
    """Torch raises on any call that synchronises. Steps in torch do, in DALI's threads, so there are none of them."""
    augment = AUGMENT.model_copy(update={"grid": 0.0, "mixup": 0.5, "cutmix": 0.5})
    pipeline = PIPELINE.model_copy(update={"augment": augment, "clahe": ClaheSettings(enabled=False)})
    with Loader(store, store.manifest, pipeline, LoaderSettings(batch_size=2), seed=5, device="cuda") as loader:
        running = loader.epoch(0)
        next(running)
        try:
            torch.cuda.set_sync_debug_mode("error")
            taken = [next(running) for _ in range(4)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(batch["image"].isfinite().all() for batch in taken)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_half_precision_and_mixing(store, mixup):
    pipeline = PIPELINE.model_copy(update={"augment": AUGMENT.model_copy(update={"mixup": mixup})})
    half = joined(batches(store, pipeline=pipeline.model_copy(update={"dtype": "float16"})))
    assert half.dtype == torch.float16
    assert torch.equal(half, joined(batches(store, pipeline=pipeline)).half())
