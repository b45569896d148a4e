"""What a long prediction has come to so far, kept beside its submission, so that a run cut short goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preprocessing.files import write_atomically


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


class Partial:
    """The parts done, in a folder beside the submission that is there only while a prediction is unfinished.

    Args:
        out: the submission; None keeps nothing on disk.
        key: everything that the predictions depend on; parts made with another key are thrown away.
    """

    def __init__(self, out: Path | None, key: str) -> None:
        self._folder = out.with_name(f".{out.name}.partial") if out else None
        self._key = hashlib.sha256(key.encode()).hexdigest()
        self.parts: list[Part] = []
        if self._folder is None:
            return
        head = self._folder / "key"
        if head.is_file() and head.read_text(encoding="utf-8") == self._key:
            self.parts = _read(self._folder)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def position(self) -> int:
        """Pictures done, in the order of image_id."""
        return self.parts[-1].position if self.parts else 0

    def add(self, part: Part) -> None:
        """Keep a part, by where it begins: what another call with this submission keeps meanwhile leaves no gap."""
        start = self.position
        self.parts.append(part)
        if self._folder is None:
            return
        if not self._folder.is_dir():  # the first part, or another call with this submission has ended meanwhile
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / "key", self._key.encode())
        path = self._folder / f"{start}.json"
        write_atomically(path, json.dumps(asdict(part)).encode())  # NaN stays NaN: Python alone reads this

    def clear(self) -> None:
        """Forget the parts on disk: the submission is written."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _read(folder: Path) -> list[Part]:
    parts: list[Part] = []
    position = 0
    while (path := folder / f"{position}.json").is_file():
        parts.append(Part(**json.loads(path.read_text(encoding="utf-8"))))
        if parts[-1].position <= position:  # the last one, without a picture
            break
        position = parts[-1].position
    return parts
