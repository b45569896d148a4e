"""The journal survives a kill at any byte, and a store has one writer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing.errors import StoreError
from preprocessing.journal import Journal, locked

ROOT = Path(__file__).resolve().parents[2]


def test_the_last_entry_about_an_image_counts(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        for value in range(3):
            for name in ("a", "b"):
                journal.append({"image_id": name, "value": value})
        assert journal.find("a") == {"image_id": "a", "value": 2}
        assert journal.find("c") is None
    with Journal(tmp_path / "j") as journal:
        assert journal.find("b") == {"image_id": "b", "value": 2}


def test_entries_are_found_whenever_they_were_added(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("preprocessing.journal._UNSORTED", 4)
    with Journal(tmp_path / "j") as journal:
        for number in range(11):
            journal.append({"image_id": str(number % 7), "value": number})
            for name in range(7):
                last = max((n for n in range(number + 1) if n % 7 == name), default=None)
                assert journal.find(str(name)) == (None if last is None else {"image_id": str(name), "value": last})


FULL = """
import resource, signal, sys
from pathlib import Path
from preprocessing.errors import StoreError
from preprocessing.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    with Journal(Path(sys.argv[1])) as journal:
        while True:
            journal.append({"image_id": "a" * 30})
except StoreError as error:
    print(error)
"""


def test_a_full_disk_is_one_error_that_closing_does_not_hide(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "j")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / 'j'}: cannot be written: File too large. Make room")
    with Journal(tmp_path / "j") as journal:
        assert journal.find("a" * 30)


def test_a_journal_cut_at_any_byte_keeps_every_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        for number in range(4):
            journal.append({"image_id": f"image {number}", "value": "é" * number})
    data = path.read_bytes()
    for end in range(len(data) + 1):
        path.write_bytes(data[:end])
        whole = data[:end].count(b"\n")
        with Journal(path) as journal:
            found = [journal.find(f"image {number}") is not None for number in range(4)]
            journal.append({"image_id": "new"})
        assert found == [number < whole for number in range(4)]
        assert path.read_bytes().count(b"\n") == whole + 1


def test_a_damaged_line_costs_its_image_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        for name in ("a", "b", "c"):
            journal.append({"image_id": name})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0garbage\n" + lines[2])
    with Journal(path) as journal:
        assert [journal.find(name) is not None for name in ("a", "b", "c")] == [True, False, True]


def test_equal_hashes_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocessing.journal._hash", lambda _: 7)
    with Journal(tmp_path / "j") as journal:
        for value in range(2):
            for name in ("a", "b"):
                journal.append({"image_id": name, "value": value})
        assert journal.find("a") == {"image_id": "a", "value": 1}
        assert journal.find("b") == {"image_id": "b", "value": 1}
        assert journal.find("c") is None


HOLD = """
import sys
from pathlib import Path
from preprocessing.journal import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_on_a_store_says_so_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StoreError, match="another run is converting into this store"), locked(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with locked(tmp_path):
        pass
