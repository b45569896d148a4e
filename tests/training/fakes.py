"""A small store on disk and plain stand-ins for Loader and monitor, so that training is tested by itself.

`python -m tests.training.fakes STORE OUT [a.b=c ...]` trains fold 0, or every fold with FOLDS=all in the environment,
in a process of its own, to be killed by tests.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from preprocessing.manifest import STORE_VERSION, Store, open_store, schema
from preprocessing.settings import ConvertSettings
from training import checkpoint, fit, session
from training.config import load_config

SIZE = 32
SMALL = (
    "model.backbone=resnet10t",
    "model.weights=none",
    "pipeline.height=32",
    "pipeline.width=32",
    "data.folds=2",
    "data.loader.batch_size=4",
    "data.loader.val_batch_size=8",
    "train.epochs=2",
    "train.device=cpu",
    "train.lr=1e-3",
)


def make_rows(patients=24, seed=0):
    """Two breasts a patient, two views a breast; a third of the patients with cancer in the left one."""
    generator = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        site, machine = str(patient % 2 + 1), str(generator.choice(["49", "48", "29"]))
        for image, (side, view) in enumerate((s, v) for s in "LR" for v in ("CC", "MLO")):
            rows.append(
                {
                    "image_id": f"{patient:03d}{image}",
                    "patient_id": f"p{patient:03d}",
                    "laterality": side,
                    "view": view,
                    "prediction_id": f"p{patient:03d}_{side}",
                    "cancer": float(patient % 3 == 0 and side == "L"),
                    "site_id": site,
                    "machine_id": machine,
                    "age": float(40 + patient),
                    "density": "ABCD"[patient % 4],
                    "implant": 0.0,
                    "BIRADS": [0.0, 1.0, 2.0, np.nan][patient % 4],
                    "crc32_full": generator.integers(2**32, dtype=np.uint32),
                }
            )
    return pd.DataFrame(rows)


def make_store(root: Path, rows: pd.DataFrame | None = None) -> Store:
    """A store whose manifest is real and whose tiles are not there."""
    root.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(make_rows() if rows is None else rows, preserve_index=False)
    for field in schema(("full",), {}):
        if field.name not in table.schema.names:
            nothing = "" if field.type == pa.string() else [] if pa.types.is_list(field.type) else None
            table = table.append_column(field, pa.array([nothing] * len(table), field.type))
    pq.write_table(table, root / "manifest.parquet")
    settings = ConvertSettings(levels=("full",)).model_dump(mode="json")
    (root / "store.json").write_text(json.dumps({"version": STORE_VERSION, "settings": settings}))
    return open_store(root)


class FakeLoader:
    """Keeps the Loader's contract with pictures made up on the spot: noise, and a bright spot where there is cancer."""

    served: ClassVar[list[tuple[int, int, list[int]]]] = []  # (epoch, step, rows) of training batches

    def __init__(self, store, rows, pipeline, loader, *, seed, train, device, rank=0, world_size=1):
        self.rows, self.train, self.seed = rows, train, seed
        self.rank, self.world = rank, world_size
        self.batch = loader.batch_size if train else loader.val_batch_size
        self.shape = (pipeline.channels, pipeline.height, pipeline.width)
        per_rank = len(rows) // world_size
        self.steps_per_epoch = (
            per_rank // self.batch if train else -(-len(range(rank, len(rows), world_size)) // self.batch)
        )
        self.wait_s = 0.0
        self.bad_samples: dict[int, str] = {}
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def order(self, epoch):
        if not self.train:
            return np.arange(self.rank, len(self.rows), self.world)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        steps = self.steps_per_epoch
        # Global batches are the same whatever the number of ranks: rank r takes its slice of each.
        return order[: steps * self.batch * self.world].reshape(steps, self.world, self.batch)[:, self.rank].ravel()

    def picture(self, index, epoch):
        generator = np.random.default_rng((self.seed, int(index), epoch if self.train else 10**6))
        image = generator.normal(size=self.shape).astype(np.float32)
        if self.rows["cancer"].iloc[index] == 1:
            image[:, 8:20, 8:20] += 2
        return image

    def epoch(self, epoch, start_step=0):
        order = self.order(epoch)
        for step in range(start_step, self.steps_per_epoch):
            index = order[step * self.batch : (step + 1) * self.batch]
            if self.train:
                FakeLoader.served.append((epoch, step, index.tolist()))
                if log := os.environ.get("SERVED"):
                    with open(f"{log}-{self.rank}", "a") as file:
                        file.write(json.dumps([epoch, step, index.tolist()]) + "\n")
            time.sleep(float(os.environ.get("SLOW", "0")))
            if (slow_from := os.environ.get("SLOW_FROM")) and len(FakeLoader.served) + (not self.train) > int(
                slow_from
            ):
                time.sleep(5)
            yield {
                "image": torch.from_numpy(np.stack([self.picture(i, epoch) for i in index])),
                "label": torch.tensor(self.rows["cancer"].to_numpy(np.float32)[index]),
                "index": torch.from_numpy(np.asarray(index, dtype=np.int64)),
                "ok": torch.ones(len(index), dtype=torch.bool),
            }

    def drawn(self, epoch, steps):
        labels = self.rows["cancer"].to_numpy()[self.order(epoch)[: steps * self.batch]]
        return {"negative": int((labels == 0).sum()), "positive": int((labels == 1).sum())}


class FakeMonitor:
    """Writes metrics.jsonl as the monitor does and times nothing."""

    def __init__(self, directory: Path | None):
        self.path = directory / "metrics.jsonl" if directory else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    @contextmanager
    def time(self, name):
        yield

    def log(self, kind, record):
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, **record}) + "\n")

    def line(self):
        return ""

    def outcome(self):
        return ""

    def summary(self):
        return {}


def open_fake_loader(store, rows, config, *, train, device, place):
    return FakeLoader(
        store,
        rows,
        config.pipeline,
        config.data.loader,
        seed=config.data.seed,
        train=train,
        device=device,
        rank=place.rank,
        world_size=place.size,
    )


def use_fakes(monkeypatch=None):
    """Put the stand-ins in the place of Loader and monitor."""
    put = monkeypatch.setattr if monkeypatch else setattr
    put(session, "open_loader", open_fake_loader)
    put(session, "open_monitor", lambda folder, config, place, step: FakeMonitor(folder if place.is_main else None))
    FakeLoader.served.clear()


def small_config(*overrides):
    return load_config(None, (*SMALL, *overrides))


def kill_at(moment: str) -> None:
    """Arrange for SIGKILL at "step N", "save N" (in the midst of the Nth save) or "epoch-end N"."""
    what, number = moment.split()
    left = int(number)

    def countdown(original, only=lambda *_: True):
        def wrapped(*arguments):
            nonlocal left
            left -= only(*arguments)
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        return wrapped

    if what == "step":
        session.Session._after_step = countdown(session.Session._after_step)
    elif what == "epoch-end":
        session.Session._end_epoch = countdown(session.Session._end_epoch)
    elif what == "save":  # between the weights and the JSON that vouches for them
        checkpoint.write_atomically = countdown(
            checkpoint.write_atomically, only=lambda path, data: path.suffix == ".json"
        )


def main() -> None:
    store, out, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    use_fakes()
    moment = os.environ.get("KILL_AT")
    if moment and os.environ.get("RANK", "0") == os.environ.get("KILL_RANK", "0"):
        kill_at(moment)
    config = small_config(*overrides)
    if os.environ.get("FOLDS") == "all":
        for summary in fit.fit_folds(config, Path(store), None, Path(out), resume=True, console=None):
            print(summary)  # noqa: T201
    else:
        print(fit.fit(config, store, 0, Path(out), resume=True))  # noqa: T201


if __name__ == "__main__":
    main()
