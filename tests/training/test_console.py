from __future__ import annotations

import json
import logging

from preprocessing.progress import Progress
from training.console import Console


def test_log_file_is_made_with_the_first_line_and_carries_the_run_id(tmp_path, capsys):
    folder = tmp_path / "run"
    with Console(folder) as console:
        assert not folder.exists()
        logging.getLogger("training.fit").info("epoch 1")
    text = (folder / "run.log").read_text()
    assert f"{console.run_id} I epoch 1" in text
    assert "epoch 1" in capsys.readouterr().err


def test_quiet_keeps_the_screen_empty_but_for_warnings(tmp_path, capsys):
    with Console(tmp_path, quiet=True) as console, console.progress("Converting") as advance:
        advance(Progress(1, 1))
        logging.getLogger("training").info("nothing to see")
        logging.getLogger("training").warning("look here")
    seen = capsys.readouterr()
    assert "nothing" not in seen.err + seen.out
    assert "look here" in seen.err
    assert "nothing to see" in (tmp_path / "run.log").read_text()


def test_json_logs_are_one_object_a_line(tmp_path, capsys):
    with Console(tmp_path, json_logs=True) as console:
        console.heading("convert")
        console.print("two\nlines")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["== convert", "two\nlines"]
    assert {line["run"] for line in lines} == {console.run_id}


def test_progress_without_a_terminal_prints_few_plain_lines(capsys):
    with Console() as console, console.progress("Converting", unit="files") as advance:
        for done in range(1, 501):
            advance(Progress(done, 500, rejected=2, bytes=10**6 * done))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 5
    assert "Converting: 500 of 500 files" in lines[-1]
    assert "2 rejected" in lines[-1]


def test_nothing_is_logged_twice_when_consoles_follow_each_other(capsys):
    for _ in range(3):
        with Console():
            pass
    with Console() as console:
        console.print("once")
    assert capsys.readouterr().err.count("once") == 1


def test_table_shows_every_cell_on_standard_output(capsys):
    with Console() as console:
        console.table("Figures", [{"name": "auroc", "value": 0.98765}, {"name": "pf1", "value": 0.5}])
    out = capsys.readouterr().out
    assert "0.9877" in out
    assert "pf1" in out
