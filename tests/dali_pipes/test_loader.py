import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType
from pydantic import ValidationError

from dali_pipes import loader as loader_module
from dali_pipes.cache import LevelCache, shared_cache
from dali_pipes.loader import Loader
from dali_pipes.pipelines import host_pipeline
from dali_pipes.plan import Draw, Plan
from dali_pipes.settings import AugmentSettings, ClaheSettings, LoaderSettings, PipelineSettings
from dali_pipes.source import Source
from preprocessing.errors import StoreError
from preprocessing.manifest import level_column
from preprocessing.tiles import read_level
from tests.dali_pipes.stores import flipped, make_store

# Every change, often.
AUGMENT = AugmentSettings(vflip=0.5, noise=0.5, blur=0.5, sharpen=0.5, grid=0.5, dropout=0.5, grid_dropout=0.3)
PIPELINE = PipelineSettings(height=64, width=48, augment=AUGMENT)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("loader") / "store")


def batches(store, batch_size=4, train=True, epoch=2, start=0, threads=2, seed=5, pipeline=PIPELINE, **more):
    rank = {name: more.pop(name) for name in ("rank", "world_size") if name in more}
    settings = LoaderSettings(batch_size=batch_size, val_batch_size=batch_size, threads=threads, **more)
    with Loader(store, store.manifest, pipeline, settings, seed=seed, train=train, **rank) as loader:
        return list(loader.epoch(epoch, start))


def joined(found, name="image"):
    return torch.cat([batch[name] for batch in found])


def test_a_batch_is_what_the_contract_says(store):
    (first, *_) = found = batches(store, train=False, batch_size=7)
    assert [len(batch["index"]) for batch in found] == [7, 7, 6]
    assert first["image"].shape == (7, 1, 64, 48)
    assert {name: value.dtype for name, value in first.items()} == {
        "image": torch.float32,
        "label": torch.float32,
        "index": torch.int64,
        "ok": torch.bool,
    }
    assert joined(found, "index").tolist() == list(range(20))
    assert joined(found, "label").tolist() == store.manifest["cancer"].tolist()
    assert joined(found, "ok").all()
    pictures = joined(found) * PIPELINE.std + PIPELINE.mean
    assert pictures.min() >= -1e-6
    assert pictures.max() <= 1 + 1e-6
    assert all(picture.std() > 0.1 for picture in pictures)


@pytest.mark.parametrize(("batch_size", "threads"), [(4, 2), (7, 4), (4, 1)])
def test_the_stream_is_the_same_for_any_batch_size_and_number_of_threads(store, batch_size, threads):
    alone = batches(store, batch_size=1, threads=1, epoch_samples=28)
    together = batches(store, batch_size=batch_size, threads=threads, epoch_samples=28)
    assert torch.equal(joined(alone, "index"), joined(together, "index"))
    assert torch.equal(joined(alone), joined(together))
    assert len(joined(alone)) == 28


def test_pictures_labels_and_rows_go_together_in_whatever_order(store):
    plain = PipelineSettings(height=64, width=48, augment=AugmentSettings(enabled=False))
    in_order, mixed_up = batches(store, train=False, pipeline=plain), batches(store, pipeline=plain)
    rows = joined(mixed_up, "index")
    assert (rows[1:] < rows[:-1]).any()
    assert torch.equal(joined(mixed_up), joined(in_order)[rows])
    assert joined(mixed_up, "label").tolist() == store.manifest["cancer"].iloc[rows.tolist()].tolist()


def test_three_ranks_together_see_what_one_sees(store):
    alone = batches(store, batch_size=6, epoch_samples=24)
    ranks = [batches(store, batch_size=2, rank=r, world_size=3, epoch_samples=24) for r in range(3)]
    for step, batch in enumerate(alone):
        assert torch.equal(batch["index"], joined([rank[step] for rank in ranks], "index"))
        assert torch.equal(batch["image"], joined([rank[step] for rank in ranks]))


def test_three_ranks_validate_every_row_once(store):
    found = [joined(batches(store, train=False, rank=r, world_size=3), "index") for r in range(3)]
    assert sorted(torch.cat(found).tolist()) == list(range(20))


@pytest.mark.parametrize("start", [1, 3, 4])
def test_a_restart_at_any_step_continues_the_stream(store, start):
    whole, rest = batches(store), batches(store, start=start)
    assert len(rest) == 5 - start
    assert torch.equal(joined(whole[start:]), joined(rest))


def test_a_start_past_the_end_gives_nothing(store):
    assert batches(store, start=5) == []


def test_epochs_and_seeds_differ(store):
    one = joined(batches(store))
    assert not torch.equal(one, joined(batches(store, epoch=3)))
    assert not torch.equal(one, joined(batches(store, seed=6)))


def test_a_loader_gives_epoch_after_epoch_also_when_one_was_left_halfway(store):
    settings = LoaderSettings(batch_size=4, threads=2)
    with Loader(store, store.manifest, PIPELINE, settings, seed=5) as loader:
        next(loader.epoch(1))
        assert torch.equal(joined(list(loader.epoch(2))), joined(batches(store)))
        assert torch.equal(joined(list(loader.epoch(3))), joined(batches(store, epoch=3)))
        assert loader.steps_per_epoch == len(loader) == 5
        assert loader.drawn(2) == {"negative": 10, "positive": 10}
        assert loader.wait_s > 0


@pytest.mark.parametrize("prefetch", [1, 5])
@pytest.mark.parametrize("graphs", [2, 3])
def test_graphs_that_take_turns_give_what_one_gives(store, monkeypatch, graphs, prefetch):
    whole, few = batches(store), batches(store, epoch_samples=4)
    monkeypatch.setitem(loader_module._GRAPHS, "cpu", graphs)
    for name in ("image", "index", "label"):
        assert torch.equal(joined(whole, name), joined(batches(store, prefetch=prefetch), name))
        assert torch.equal(joined(few, name), joined(batches(store, epoch_samples=4, prefetch=prefetch), name))
    assert torch.equal(joined(whole[3:]), joined(batches(store, start=3, prefetch=prefetch)))
    settings = LoaderSettings(batch_size=4, threads=2, prefetch=prefetch)
    with Loader(store, store.manifest, PIPELINE, settings, seed=5) as loader:
        next(loader.epoch(1))  # left, with batches under way in each graph
        assert torch.equal(joined(loader.epoch(2)), joined(whole))
        assert torch.equal(joined(loader.epoch(2)), joined(whole))


def test_an_epoch_that_was_overtaken_by_another_says_so(store):
    with Loader(store, store.manifest, PIPELINE, LoaderSettings(batch_size=4, threads=2)) as loader:
        first = loader.epoch(0)
        next(first)
        next(loader.epoch(1))
        with pytest.raises(RuntimeError, match="another epoch"):
            next(first)


def test_an_epoch_of_a_loader_that_was_closed_says_so(store):
    with Loader(store, store.manifest, PIPELINE, LoaderSettings(batch_size=4, threads=2)) as loader:
        running = loader.epoch(0)
        next(running)
        unused = loader.epoch(1)
    for left in (running, unused):
        with pytest.raises(RuntimeError, match="this loader was closed"):
            next(left)


def test_a_closed_loader_has_emptied_its_cache(store):
    with Loader(store, store.manifest, PIPELINE, LoaderSettings(threads=2, cache="host"), train=False) as loader:
        assert len([*loader.epoch(0)]) == 1
        assert loader.cache.bytes > 0
    assert (len(loader.cache), loader.cache.bytes) == (0, 0)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_graph_that_fails_says_so_and_holds_nothing(store, monkeypatch, prefetch):
    def failing(source, settings, batch_size, threads, prefetch, device_id):
        def refuse(_):
            raise MemoryError("no memory for the warp")

        pipeline = Pipeline(batch_size, threads, device_id=None, prefetch_queue_depth=prefetch, exec_dynamic=True)
        with pipeline:
            pictures = fn.external_source(source=source, batch=True, dtype=DALIDataType.FLOAT, ndim=3, layout="HWC")
            pipeline.set_outputs(fn.python_function(pictures, function=refuse))
        pipeline.build()
        return pipeline

    monkeypatch.setattr(loader_module, "host_pipeline", failing)
    before = set(threading.enumerate())
    settings = LoaderSettings(batch_size=2, threads=2, prefetch=prefetch, cache="host")
    with (
        pytest.raises(RuntimeError, match="no memory for the warp"),
        Loader(store, store.manifest, PIPELINE, settings) as loader,
    ):
        list(loader.epoch(0))
    assert [thread for thread in threading.enumerate() if thread not in before] == []
    assert len(loader.cache) == 0


def test_without_a_gpu_of_its_own_a_loader_leaves_cuda_alone(store, monkeypatch):
    """A context there would take memory on a GPU that others use, or fail on one that is full."""

    def refuse():
        raise RuntimeError("CUDA was begun")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    assert joined(batches(store), "ok").all()


def test_steps_of_the_host_may_feed_a_gpu(store, monkeypatch):
    """Faked as far as the graph: what it is built with, and that the samples given to it are finished pictures."""
    built = []

    def faked(source, settings, batch_size, threads, prefetch, device_id):
        built.append((source, device_id))
        return host_pipeline(source, settings, batch_size, threads, prefetch)

    monkeypatch.setattr(loader_module, "host_pipeline", faked)
    settings = LoaderSettings(batch_size=4, threads=2, steps_on="cpu", cache="host")
    with Loader(store, store.manifest, PIPELINE, settings, seed=5, device="cuda:3") as loader:
        loader._open()
        loader._feed = loader._batches(2, 0)
        ((source, device_id),) = built
        pictures = torch.from_numpy(np.stack(source()))
    assert device_id == 3
    (first, *_) = batches(store, steps_on="cpu")
    expected = first["image"] * PIPELINE.std + PIPELINE.mean
    torch.testing.assert_close(pictures.permute(0, 3, 1, 2), expected, rtol=0, atol=1e-6)


def test_levels_are_not_kept_on_a_gpu_that_has_no_steps():
    with pytest.raises(ValidationError, match="take cache = 'host'"):
        LoaderSettings(steps_on="cpu", cache="device")


def held_back(monkeypatch, *held):
    """An event for which the sample at (epoch, place) waits, whether it came in time, and the places asked for."""
    waited, asked, go_on, sample = [], [], threading.Event(), Plan.sample

    def slow(self, epoch, place):
        asked.append(place)
        if (epoch, place) == held:
            waited.append(go_on.wait(60))
        return sample(self, epoch, place)

    monkeypatch.setattr(Plan, "sample", slow)
    return go_on, waited, asked


def test_batches_that_are_ready_do_not_wait_for_a_later_one(store, monkeypatch):
    go_on, waited, _ = held_back(monkeypatch, 0, 10)
    settings = LoaderSettings(batch_size=1, threads=2, prefetch=2)
    with Loader(store, store.manifest, PIPELINE, settings) as loader:
        running = loader.epoch(0)
        for _ in range(10):
            next(running)
        assert waited == []
        go_on.set()
        assert len(list(running)) == 10


def test_batches_are_prepared_ahead_of_one_that_is_slow(store, monkeypatch):
    go_on, waited, asked = held_back(monkeypatch, 0, 5)
    settings = LoaderSettings(batch_size=1, threads=8, prefetch=4)
    with Loader(store, store.manifest, PIPELINE, settings) as loader:
        running = loader.epoch(0)  # DALI's queue takes four batches at once, and a fifth when it is ready
        first = [next(running)]
        deadline = time.monotonic() + 30
        while 8 not in asked and not loader._is_next_ready() and time.monotonic() < deadline:
            time.sleep(0.01)
        first.append(next(running))
        while set(asked) != set(range(9)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert set(asked) == set(range(9))
        go_on.set()
        assert len([*first, *running]) == 20
        assert waited == [True]


def test_what_waits_for_an_epoch_that_was_left_is_not_prepared_any_more(store, monkeypatch):
    asked, sample = [], Plan.sample

    def slow(self, epoch, place):
        asked.append(epoch)
        time.sleep(0.1 * (epoch == 0))
        return sample(self, epoch, place)

    monkeypatch.setattr(Plan, "sample", slow)
    with Loader(store, store.manifest, PIPELINE, LoaderSettings(batch_size=2, threads=1, prefetch=2)) as loader:
        next(loader.epoch(0))  # of five or six batches in the pool two or three have gone to DALI
        assert len(list(loader.epoch(1))) == 10
        assert 4 <= asked.count(0) < 12


def test_after_an_epoch_that_was_left_a_graph_takes_as_many_batches_as_before(store, monkeypatch):
    go_on, waited, _ = held_back(monkeypatch, 0, 4)
    settings = LoaderSettings(batch_size=1, threads=2, prefetch=4)
    with Loader(store, store.manifest, PIPELINE, settings) as loader:
        left = loader.epoch(0)
        for _ in range(4):
            next(left)
        assert len(loader._underway) == 0  # the fifth is not ready
        go_on.set()
        next(loader.epoch(1))
        assert len(loader._underway) >= 3  # and a fourth where it is ready
        assert waited == [True]


def test_what_is_drawn_is_what_drawn_says(store):
    with Loader(store, store.manifest, PIPELINE, LoaderSettings(batch_size=3, positive_share=0.3)) as loader:
        labels = joined(list(loader.epoch(7)), "label")
        assert loader.drawn(7) == {"negative": int((labels == 0).sum()), "positive": int((labels == 1).sum())}


def test_many_loaders_side_by_side_do_not_mix(store):
    settings = LoaderSettings(batch_size=4, val_batch_size=4, threads=2)
    expected = joined(batches(store))
    with (
        Loader(store, store.manifest, PIPELINE, settings, seed=5) as one,
        Loader(store, store.manifest, PIPELINE, settings, train=False) as two,
        Loader(store, store.manifest, PIPELINE, settings, seed=5) as three,
    ):
        found = list(zip(one.epoch(2), two.epoch(0), three.epoch(2), strict=True))
    assert torch.equal(joined([a for a, _, _ in found]), expected)
    assert torch.equal(joined([c for _, _, c in found]), expected)
    assert joined([b for _, b, _ in found], "index").tolist() == list(range(20))


def test_batches_stay_as_they_are_when_later_ones_come(store):
    with Loader(store, store.manifest, PIPELINE, LoaderSettings(batch_size=2, threads=2), seed=5) as loader:
        kept = [(batch["image"], batch["image"].clone()) for batch in loader.epoch(0)]
    assert all(torch.equal(a, b) for a, b in kept)


class Event:
    """A CUDA event that comes to pass when the test says so; also the stream that records it."""

    def __init__(self):
        self.past = False

    def record_event(self):
        return self

    def query(self):
        return self.past

    def synchronize(self):
        self.past = True


def test_what_a_gpu_may_still_read_is_kept_until_it_has_come_past_it():
    lent, events = loader_module.Lent(), [Event() for _ in range(4)]
    buffers = [torch.zeros(1) for _ in events]
    alive = [weakref.ref(buffer) for buffer in buffers]

    def held():
        return [reference() is not None for reference in alive]

    for number in range(3):
        lent.keep(buffers[number], events[number])
        buffers[number] = None
    assert held() == [True, True, True, True]
    events[0].past = events[2].past = True  # in the order of their stream the second comes before the third
    lent.keep(buffers[3], events[3])
    buffers[3] = None
    assert held() == [False, True, True, True]
    lent.close()
    assert events[3].past
    assert held() == [False] * 4


def test_a_closed_loader_leaves_no_threads(store):
    gc.collect()
    before = set(threading.enumerate())
    batches(store)
    assert set(threading.enumerate()) <= before


def test_three_channels_are_three_times_one(store):
    three = joined(batches(store, pipeline=PIPELINE.model_copy(update={"channels": 3})))
    assert torch.equal(three, joined(batches(store)).expand(-1, 3, -1, -1))


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_half_precision_is_the_same_pictures_rounded(store, mixup):
    pipeline = PIPELINE.model_copy(update={"augment": AUGMENT.model_copy(update={"mixup": mixup})})
    half = joined(batches(store, pipeline=pipeline.model_copy(update={"dtype": "float16"})))
    assert half.dtype == torch.float16
    assert torch.equal(half, joined(batches(store, pipeline=pipeline)).half())


def test_a_tile_of_another_size_than_the_manifest_says_costs_its_sample_alone(tmp_path):
    other = make_store(tmp_path / "store", count=4)
    rows = other.manifest.copy()
    rows.loc[1, "height_64"] -= 1
    settings = LoaderSettings(val_batch_size=4, threads=2)
    with Loader(other, rows, PIPELINE, settings, train=False) as loader:
        (batch,) = loader.epoch(0)
        assert batch["ok"].tolist() == [True, False, True, True]
        assert "expected 63" in loader.bad_samples[1]


def test_the_level_read_is_the_smallest_that_need_not_be_enlarged(store, tmp_path):
    other = make_store(tmp_path / "store")
    for path in (other.root / "tiles" / "full").rglob("*.tif"):
        path.unlink()
    for path in (other.root / "tiles" / "128").rglob("*.tif"):
        path.unlink()
    found = batches(other, train=False, pipeline=PIPELINE)
    assert torch.equal(joined(found), joined(batches(store, train=False)))


@pytest.mark.parametrize("codec", ["deflate", "lzw", "none", "htj2k"])
def test_every_codec_of_the_conversion_gives_the_same_bits(store, tmp_path, codec):
    other = make_store(tmp_path / "store", count=6, codec=codec)
    assert torch.equal(joined(batches(other, train=False)), joined(batches(store, train=False))[:6])


def test_a_picture_without_clahe_or_augmentation_is_the_window_of_its_level(tmp_path):
    store = make_store(tmp_path / "store", count=1, sizes=((64, 64),))
    plain = PipelineSettings(height=64, width=64, clahe=ClaheSettings(enabled=False), mean=0, std=1)
    level = read_level(store.root / store.manifest["path_64"].iloc[0]).astype(np.float64)
    expected = np.clip((level - 2047.5) / 4095 + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1, centre 2048, width 4096
    image = joined(batches(store, train=False, pipeline=plain))[0, 0].numpy()
    assert np.abs(image - expected).max() < 1e-5


def path_of(store, row, level="64"):
    return store.root / store.manifest[level_column("path", level)].iloc[row]


def test_a_damaged_tile_costs_its_sample_alone(store, tmp_path):
    other = make_store(tmp_path / "store")
    flipped(path_of(other, 3), 1000)
    path_of(other, 5).unlink()
    path_of(other, 8).write_bytes(path_of(other, 8).read_bytes()[:-10])
    path_of(other, 9).write_bytes(path_of(other, 10).read_bytes())
    path_of(other, 11).write_bytes(b"")
    found, sound = batches(other, train=False), batches(store, train=False)
    ok = joined(found, "ok")
    assert (~ok).nonzero().flatten().tolist() == [3, 5, 8, 9, 11]
    assert torch.equal(joined(found)[ok], joined(sound)[ok])
    assert joined(found, "index").tolist() == list(range(20))
    assert torch.isfinite(joined(found)).all()


def test_more_damaged_tiles_than_allowed_stop_the_run_and_are_listed(tmp_path):
    other = make_store(tmp_path / "store")
    for row in (2, 6, 7):
        flipped(path_of(other, row), 500 + row)
    assert len(batches(other, train=False, max_bad_samples=3)) == 5
    with pytest.raises(StoreError, match="3 damaged tiles") as error:
        batches(other, train=False, max_bad_samples=2)
    assert all(str(path_of(other, row)) in str(error.value) for row in (2, 6, 7))


def test_a_damaged_tile_counts_once_however_often_it_comes(tmp_path):
    other = make_store(tmp_path / "store")
    flipped(path_of(other, 0), 77)  # a positive, which balance repeats
    settings = LoaderSettings(batch_size=4, max_bad_samples=1, threads=2)
    with Loader(other, other.manifest, PIPELINE, settings) as loader:
        bad = sum(int((~batch["ok"]).sum()) for epoch in range(3) for batch in loader.epoch(epoch))
        assert bad > 3
        assert list(loader.bad_samples) == [0]


def test_every_single_bit_flip_is_found(store, tmp_path):
    other = make_store(tmp_path / "store", count=1)
    path = path_of(other, 0)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    source = Source(other, other.manifest, PIPELINE)
    assert source.sample(0, Draw())[1] is None
    found = 0
    bits = [*range(64), *rng.integers(0, len(data) * 8, 200), len(data) * 8 - 1]
    for bit in bits:
        flipped(path, int(bit))
        found += source.sample(0, Draw())[1] is not None
        path.write_bytes(data)
    assert found == len(bits)


def test_memory_does_not_grow_with_the_epochs(store):
    """The epochs' batches together are 200 MB."""
    process, large = psutil.Process(), PIPELINE.model_copy(update={"height": 256, "width": 256})
    with Loader(store, store.manifest, large, LoaderSettings(batch_size=4, threads=2)) as loader:
        for epoch in range(10):
            joined(list(loader.epoch(epoch)))
        before = process.memory_info().rss
        for epoch in range(40):
            joined(list(loader.epoch(epoch)))
        assert process.memory_info().rss - before < 30e6


@pytest.mark.parametrize("cache", ["host", "device"])
def test_a_cache_changes_no_bit_and_serves_the_second_epoch(store, cache):
    settings = LoaderSettings(batch_size=4, threads=2, cache=cache)
    with Loader(store, store.manifest, PIPELINE, settings, seed=5) as loader:
        assert torch.equal(joined(list(loader.epoch(2))), joined(batches(store, epoch=2)))
        before = loader.cache.misses
        assert torch.equal(joined(list(loader.epoch(2))), joined(batches(store, epoch=2)))
        assert loader.cache.misses == before
        assert loader.cache.hits >= 20


def test_loaders_share_a_cache_until_the_last_one_closes(store):
    settings = LoaderSettings(batch_size=4, val_batch_size=4, threads=2, cache="host")
    with Loader(store, store.manifest, PIPELINE, settings, train=False) as one:
        list(one.epoch(0))
        with Loader(store, store.manifest, PIPELINE, settings, train=False) as two:
            list(two.epoch(0))
            assert two.cache is one.cache
            assert two.cache.hits == two.cache.misses == 20
    with Loader(store, store.manifest, PIPELINE, settings, train=False) as three:
        list(three.epoch(0))
        assert three.cache.hits == 0


def test_a_shared_cache_has_the_largest_budget_of_those_who_share_it():
    with shared_cache("here", 100) as one, shared_cache("here", 10) as other:
        assert one is other
        assert one.budget == 100
        with shared_cache("here", 200):
            assert one.budget == 200


def test_a_level_that_two_threads_make_at_once_is_kept_and_counted_once():
    cache, level = LevelCache(1000), np.zeros(300, np.uint8)
    cache.get("level", lambda: cache.get("level", lambda: level))
    assert (len(cache), cache.bytes) == (1, 300)


def test_a_cache_keeps_to_its_budget():
    cache = LevelCache(1000)
    for key in range(10):
        assert cache.get(key, lambda: np.zeros(300, np.uint8)).nbytes == 300
    assert cache.bytes == 900
    assert [cache.get(key, lambda: np.zeros(300, np.uint8)) is not None for key in range(10)].count(True) == 10
    assert cache.hits == 3


def test_a_damaged_tile_is_found_with_a_cache_too(tmp_path):
    other = make_store(tmp_path / "store", count=6)
    flipped(path_of(other, 3), 1000)
    assert joined(batches(other, train=False, cache="host"), "ok").tolist() == [True] * 3 + [False] + [True] * 2


FOREVER = """
import sys
from dali_pipes.loader import Loader
from dali_pipes.settings import LoaderSettings, PipelineSettings
from preprocessing.manifest import open_store

store = open_store(sys.argv[1])
settings = LoaderSettings(batch_size=4, threads=2, cache="host")
with Loader(store, store.manifest, PipelineSettings(height=64, width=64), settings) as loader:
    for epoch in range(10**6):
        for batch in loader.epoch(epoch):
            print("batch", flush=True)
"""


def test_a_killed_loader_leaves_no_process_and_no_shared_memory(store):
    def shared():
        return {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()

    before = shared()
    with subprocess.Popen([sys.executable, "-c", FOREVER, store.root], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "batch\n"
        children = psutil.Process(process.pid).children(recursive=True)
        mine = {name for name in shared() - before if str(process.pid) in name}
        process.kill()
    assert children == []
    assert mine == set()
    assert process.returncode == -signal.SIGKILL
