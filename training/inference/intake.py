"""Pictures to predict, chunk by chunk: from a store as they are, or from raw files as a stream.

The stream converts with the very code and settings that made the training store, in the same guarded processes, into a
spool folder that holds a few chunks at a time. What comes to the models is therefore what a store would have given,
bit for bit, and a picture that cannot be used ends as the same typed rejection.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from preprocessing import ingest, workers
from preprocessing.errors import InputError
from preprocessing.files import scratch
from preprocessing.manifest import Store, level_column, schema
from preprocessing.settings import FULL, ConvertSettings
from preprocessing.table import Source, sources

_CHUNK_GROWTH = 2  # a short first chunk starts the device early, long later ones spare it restarts
_CHUNK_ROWS = 1024
_CHUNK_BYTES = 2**28  # of the tiles of one chunk, at most
_FIRST_ROWS = 64
_AHEAD = 2  # chunks that may wait for the models


@dataclass
class Chunk:
    """Some pictures, in order of image_id.

    Attributes:
        store: where their tiles are.
        rows: of its manifest, with a fresh index.
        position: pictures done with this chunk, in that order, usable or not.
        failed: (image_id, reason, detail) of those that cannot be used.
    """

    store: Store
    rows: pd.DataFrame
    position: int
    failed: list[tuple[str, str, str]]


def from_store(store: Store, listed: pd.DataFrame | None = None) -> Chunk:
    """The pictures of a store, all of them or those that a table names by `image_id`, as one chunk."""
    rows, rejected = store.manifest, store.rejected
    if listed is not None:
        wanted = set(listed["image_id"])
        rows, rejected = rows[rows["image_id"].isin(wanted)], rejected[rejected["image_id"].isin(wanted)]
    failed = list(rejected[["image_id", "reason", "detail"]].itertuples(index=False, name=None))
    return Chunk(store, rows.sort_values("image_id", ignore_index=True), len(rows) + len(failed), failed)


def levels_read(levels: Sequence[str], longest_side: int, also: Collection[str] = ()) -> tuple[str, ...]:
    """The levels that are not larger than any that the loader would choose, and `also`, which patches are read from."""
    enough = [level for level in levels if level != FULL and int(level) >= longest_side]
    if not enough:
        return tuple(levels)
    most = int(enough[-1])
    return tuple(each for each in levels if each in also or (each != FULL and int(each) <= most))


@contextmanager
def stream(
    images: Path,
    listed: pd.DataFrame,
    from_csv: bool,
    settings: ConvertSettings,
    levels: tuple[str, ...],
    batch: int,
    start: int = 0,
    count: int = 0,
) -> Iterator[Iterator[Chunk]]:
    """Decode raw pictures in processes, ahead of whoever takes the chunks.

    Args:
        images: their folder.
        listed: their table, from `preprocessing.table`.
        from_csv: whether it is the user's own table, or a listing of the folder.
        settings: the conversion.
        levels: of it those that are wanted; `levels_read`.
        batch: chunks have a multiple of so many rows, the last one excepted.
        start: pictures to leave out, for an earlier call got that far: the `position` of one of its chunks.
        count: processes; 0 for one a core.

    Yields:
        The chunks, in order of image_id. A chunk's tiles are gone when the next one is asked for.

    Raises:
        InputError: there is no such folder, or the spool cannot be written.
    """
    if not images.is_dir():
        raise InputError(f"{images}: no such folder of pictures. Give one with --images.")
    ordered = listed.sort_values("image_id", ignore_index=True).iloc[start:]
    with scratch("mammopipe-predict-") as spool:
        ingest.scratch_folder(spool).mkdir()
        settings = settings.model_copy(update={"codec": "none"})
        store = Store(spool, settings.model_copy(update={"levels": levels}))
        jobs = (ingest.Job(images.absolute(), spool, settings, s, levels) for s in sources(images, ordered, from_csv))
        limits = workers.Limits.of(settings)
        outcomes = workers.run_local(ingest.stage, jobs, count, limits, partial(ingest.settle, durable=False))
        stop = threading.Event()
        with _ahead(_chunks(outcomes, ordered["image_id"].tolist(), start, store, batch, stop), stop) as chunks:
            yield _then_removed(chunks)


def _then_removed(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    for chunk in chunks:
        yield chunk
        for level in chunk.store.levels:
            for path in chunk.rows[level_column("path", level)]:
                (chunk.store.root / path).unlink(missing_ok=True)


def _chunks(
    outcomes: Generator[workers.Outcome, None, None],
    order: list[str],
    start: int,
    store: Store,
    batch: int,
    stop: threading.Event,
) -> Generator[Chunk, None, None]:
    """Outcomes, which come as they are done, as chunks in the given order of image_ids, until they have to `stop`."""
    described = schema(store.levels, {})
    waiting: dict[str, workers.Outcome] = {}
    rows: list[dict[str, Any]] = []
    failed: list[tuple[str, str, str]] = []
    side = 4096 if store.levels[0] == FULL else int(store.levels[0])
    most = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // (2 * side * side)))
    size = _rounded_up(min(_FIRST_ROWS, most), batch)
    position = 0

    def close() -> Chunk:
        frame = pa.Table.from_pylist(rows, schema=described).to_pandas()
        chunk = Chunk(store, frame, start + position, list(failed))
        rows.clear()
        failed.clear()
        return chunk

    try:
        for outcome in outcomes:
            if stop.is_set():
                return
            waiting[outcome.task.source.image_id] = outcome
            while position < len(order) and order[position] in waiting:
                _take(waiting.pop(order[position]), rows, failed)
                position += 1
                if len(rows) == size:
                    yield close()
                    size = min(size * _CHUNK_GROWTH, _rounded_up(most, batch))
        # A worker that crashed has its last few pictures done again. One of them that came out otherwise the second
        # time is left here: neither result can be trusted, but the first one has been predicted.
        failed += [(name, "crash", "decoded differently after a crash of its process") for name in sorted(waiting)]
        if rows or failed:
            yield close()
    except ingest.WriteError as error:
        raise InputError(
            f"{store.root}: cannot be written: {error}. Make room, or set TMPDIR to another disk."
        ) from None
    finally:
        outcomes.close()


def _take(outcome: workers.Outcome, rows: list[dict[str, Any]], failed: list[tuple[str, str, str]]) -> None:
    source: Source = outcome.task.source
    if outcome.failure is not None:
        failed.append((source.image_id, outcome.failure.reason, outcome.failure.detail))
        return
    entry = outcome.result
    if "rejected" in entry:
        failed.append((source.image_id, *entry["rejected"]))
        return
    row = ingest.manifest_row(source.columns, entry["facts"], source.image_id)
    rows.append(row | ingest.tile_columns(entry["tiles"]))


def _rounded_up(rows: int, batch: int) -> int:
    return -(-rows // batch) * batch


@contextmanager
def _ahead(chunks: Generator[Chunk, None, None], stop: threading.Event) -> Iterator[Iterator[Chunk]]:
    """Draw chunks in a thread, a few ahead, for decoding to go on while the models work. `stop` is set at the end."""
    drawn: queue.Queue[Any] = queue.Queue(maxsize=_AHEAD)
    end = object()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                drawn.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def draw() -> None:
        last: Any = end
        try:
            for chunk in chunks:
                put(chunk)
                if stop.is_set():
                    break
        except BaseException as error:  # noqa: BLE001  raised again where the chunks are taken
            last = error
        finally:
            chunks.close()
            put(last)

    def taken() -> Iterator[Chunk]:
        while (item := drawn.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=draw, name="intake", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stop.set()
        thread.join()
