"""In a process of its own: the setting holds for good."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from dali_pipes import memory
from tests.dali_pipes.stores import make_store

ROOT = Path(__file__).resolve().parents[2]

FAULTS = """
import resource, sys
import torch
from dali_pipes.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.set_num_threads(1)
for _ in range(12):  # glibc splits what it aligns, and joins the rests after some rounds
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_not_asked_for_again():
    """Blocks of 64 MiB: below 32 MiB glibc itself learns to keep them."""
    assert 4 * faults("kept") < faults("given back")


RELEASED = """
import sys
from pathlib import Path
import psutil
from dali_pipes.loader import Loader
from dali_pipes.settings import LoaderSettings, PipelineSettings
from preprocessing.manifest import open_store

store = open_store(Path(sys.argv[1]))
settings = LoaderSettings(batch_size=32, threads=4, prefetch=4, epoch_samples=640)
pipeline = PipelineSettings(height=512, width=512)

def used(epochs):
    with Loader(store, store.manifest, pipeline, settings) as loader:
        for epoch in range(epochs):
            for batch in loader.epoch(epoch):
                pass
        del batch
        most = psutil.Process().memory_info().rss
    return most / 2**20, psutil.Process().memory_info().rss / 2**20

used(1)  # libraries that load late
print(*used(1), *used(2))
"""


def test_a_closed_loader_gives_its_memory_back(tmp_path):
    """Ten batches are 320 MiB."""
    make_store(tmp_path / "store")
    command = [sys.executable, "-c", RELEASED, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, after_first, second, after_second = map(float, done.stdout.split())
    assert after_first < first - 150
    assert after_second < second - 150
    assert after_second < after_first + 100


def test_what_is_kept_for_good_is_not_given_back(monkeypatch):
    """A training's tensors lie where a loader's batches were."""
    called = []
    monkeypatch.setattr(memory, "_for_good", threading.Event())
    monkeypatch.setattr(memory, "_function", lambda name: lambda *values: called.append(name) or 1)
    assert memory.keep_freed_memory(for_good=False)
    memory.give_back_freed_memory()
    assert called[-1] == "malloc_trim"
    assert memory.keep_freed_memory()
    memory.give_back_freed_memory()
    assert called[-1] == "mallopt"
