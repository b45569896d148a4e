"""What a long prediction has come to so far, kept beside its submission, so that a run cut short goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preprocessing.errors import InputError
from preprocessing.files import LOCK, claimed, write_atomically


@dataclass(frozen=True)
class Part:
    """One chunk's outcome.

    Attributes:
        position: pictures done up to here, in the order of image_id.
        facts: what each readable picture is, one dict a picture.
        by_run: its probabilities, one list a picture.
        failed: [image_id, reason, detail] of those without prediction.
    """

    position: int
    facts: list[dict[str, Any]]
    by_run: list[list[float]]
    failed: list[list[str]]


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Hold a submission for one prediction; gives the folder beside it that is there meanwhile.

    Raises:
        InputError: another prediction writes there, or the folder cannot be written.
    """
    folder = out.with_name(f".{out.name}.partial")
    busy = f"{out}: another prediction is being written there. Wait for it to end, or take another --out."
    with claimed(folder, InputError(busy)):
        yield folder


@contextmanager
def unfinished(out: Path, key: str) -> Iterator[Partial]:
    """The parts of a submission that are done, in a folder beside it that is there only while it is unfinished. One
    prediction holds it.

    Args:
        out: the submission.
        key: everything that the predictions depend on; parts made with another key are thrown away.

    Raises:
        InputError: as `writing`.
    """
    with writing(out) as folder:
        yield Partial(folder, hashlib.sha256(key.encode()).hexdigest())


class Partial:
    """The parts done.

    Args:
        folder: where they are kept; without one they are not.
        key: of what they were made with.
    """

    def __init__(self, folder: Path | None = None, key: str = "") -> None:
        self._folder, self._key = folder, key
        self.parts: list[Part] = []
        if folder is None:
            return
        head = folder / "key"
        if head.is_file() and head.read_bytes() == key.encode():
            self.parts = _read(folder)
        else:
            self.clear()

    @property
    def position(self) -> int:
        """Pictures done, in the order of image_id."""
        return self.parts[-1].position if self.parts else 0

    def add(self, part: Part) -> None:
        """Keep a part, by where it begins."""
        start = self.position
        self.parts.append(part)
        if self._folder is not None:
            if not (self._folder / "key").is_file():
                write_atomically(self._folder / "key", self._key.encode())
            # NaN stays NaN: Python alone reads this.
            write_atomically(self._folder / f"{start}.json", json.dumps(asdict(part)).encode())

    def clear(self) -> None:
        """Forget the parts on disk: the submission is written."""
        for path in self._folder.iterdir() if self._folder is not None else ():
            if path.name != LOCK:
                path.unlink()


def _read(folder: Path) -> list[Part]:
    parts: list[Part] = []
    position = 0
    while (path := folder / f"{position}.json").is_file():
        try:
            parts.append(Part(**json.loads(path.read_bytes())))
        except (TypeError, ValueError):  # damaged; it is made anew
            break
        if parts[-1].position <= position:  # the last one, without a picture
            break
        position = parts[-1].position
    return parts
