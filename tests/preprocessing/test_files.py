"""Files are there whole or not at all, and a folder is one process's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from preprocessing import files
from preprocessing.errors import StoreError

ROOT = Path(__file__).resolve().parents[2]


def test_an_error_while_a_file_is_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    files.write_atomically(path, b"earlier")
    with suppress(RuntimeError), files.replaced(path) as file:
        file.write(b"a part")
        raise RuntimeError
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_by_the_file_that_it_kept_from_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"), files.replaced(path):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


HOLD = """
import sys
from pathlib import Path
from preprocessing.errors import StoreError
from preprocessing.files import held
with held(Path(sys.argv[1]), StoreError("busy")):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_abandoned_when_the_process_that_held_it_was_killed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_YOUNG_S", 0.0)
    assert not files.abandoned(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert not files.abandoned(tmp_path)
        holder.kill()
    assert files.abandoned(tmp_path)


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch, caplog) -> None:
    def without(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", without)
    with files.held(tmp_path, StoreError("busy")):
        pass
    assert "cannot be locked (Function not implemented)" in caplog.text
    assert not files.abandoned(tmp_path)


def test_the_scratch_folder_of_a_killed_process_goes_with_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, young = tmp_path / "mammopipe-left", tmp_path / "mammopipe-about-to-be-locked"
    other = tmp_path / "mammopipe-without-a-lock"
    for folder in (left, young, other):
        folder.mkdir()
        if folder is not other:
            (folder / files.LOCK).touch()
        if folder is not young:
            os.utime(folder, (0, 0))
    with files.scratch("mammopipe-") as one, files.scratch("mammopipe-") as two:
        assert one.is_dir()
        assert two.is_dir()
        assert not left.exists()
    assert sorted(tmp_path.iterdir()) == [young, other]
