"""What a conversion has finished: an append-only file of one JSON object a line, read again after any interruption.

The last line about an image counts. A line torn by a kill is dropped when the journal is opened. In memory an image
costs 16 bytes: the hash of its id and where its line begins.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preprocessing.errors import StoreError
from preprocessing.files import held

Entry = dict[str, Any]
_UNSORTED = 4096  # new entries that are looked up apart, for sorting all of them takes longer the more there are


class Journal:
    """Reads and appends entries, each a JSON object with an `image_id`. Use as a context manager.

    Raises:
        StoreError: the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened for writing: {error.strerror}.") from None
        self._failed = False
        self._hashes, self._offsets = array("Q"), array("Q")
        self._end = self._scan()
        self._index = self._sorted()
        self._added: dict[int, list[int]] = {}  # of the lines that the index does not have yet

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush to the disk and close.

        Raises:
            StoreError: it cannot be written; an entry that could not be added has said so already.
        """
        if self._file.closed:
            return
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            if not self._failed:
                raise self._unwritten(error) from None

    def append(self, entry: Entry) -> None:
        """Add an entry; it replaces an earlier one about the same image.

        Raises:
            StoreError: the disk is full.
        """
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        try:
            self._write(line)
        except OSError as error:
            self._failed = True
            raise self._unwritten(error) from None
        self._remember(entry["image_id"], self._end)
        self._added.setdefault(self._hashes[-1], []).append(self._end)
        self._end += len(line)
        if len(self._added) >= _UNSORTED:
            self._index = self._sorted()
            self._added.clear()

    def find(self, image_id: str) -> Entry | None:
        """The last entry about an image."""
        wanted = _hash(image_id)
        hashes, offsets = self._index
        first, end = (int(np.searchsorted(hashes, np.uint64(wanted), side)) for side in ("left", "right"))
        # In the order of their lines; the last one counts.
        for offset in reversed([*offsets[first:end].tolist(), *self._added.get(wanted, [])]):
            self._file.seek(offset)
            entry = json.loads(self._file.readline())
            if entry["image_id"] == image_id:
                return entry
        return None

    def _unwritten(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self._path}: cannot be written: {error.strerror}. Make room and run the same command again; "
            "what is finished is kept."
        )

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def _scan(self) -> int:
        """Index every whole line and cut off a torn last one; returns the end."""
        self._file.seek(0)
        offset = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            with suppress(ValueError, KeyError, TypeError):  # damaged: its image is done again
                self._remember(json.loads(line)["image_id"], offset)
            offset += len(line)
        self._file.truncate(offset)
        return offset

    def _remember(self, image_id: str, offset: int) -> None:
        self._hashes.append(_hash(image_id))
        self._offsets.append(offset)

    def _sorted(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        hashes, offsets = np.array(self._hashes, np.uint64), np.array(self._offsets, np.uint64)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], offsets[order]


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Hold a store for one run. The lock ends with the process, however that ends.

    Raises:
        StoreError: another run holds it, or the folder cannot be written.
    """
    busy = f"{store}: another run is converting into this store. Wait for it to end, or take another --out."
    with held(store, StoreError(busy)):
        yield


def _hash(image_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little")
