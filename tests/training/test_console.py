from __future__ import annotations

import io
import json
import logging
import re

import pytest
from rich.console import Console as RichConsole

from preprocessing.progress import Progress
from tests.training import fakes
from training import fit
from training.console import Console
from training.console import clock as clock_text


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


def test_figures_are_shown_beside_the_rate_and_asked_only_when_shown(capsys, monkeypatch):
    clock, asked = [0.0], []
    monkeypatch.setattr("training.console.time.monotonic", lambda: clock[0])

    def figures() -> str:
        asked.append(clock[0])
        return f"loss {clock[0] / 100:.2f}"

    with Console() as console, console.progress("Epoch 1 of 2", "images", figures) as advance:
        for second in range(1, 31):
            clock[0] = float(second)
            advance(Progress(8 * second, 240))
    lines = [line.split(" I ")[1] for line in capsys.readouterr().err.splitlines()]
    assert asked == [10.0, 20.0, 30.0]
    assert lines[0] == "Epoch 1 of 2: 80 of 240 images, 8.0 images/s, 0:20 left, loss 0.10"
    assert lines[-1] == "Epoch 1 of 2: 240 of 240 images, 8.0 images/s, loss 0.30"


def test_a_continued_job_is_not_credited_with_what_was_done_before(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("training.console.time.monotonic", lambda: clock[0])
    with Console() as console, console.progress("Predicting", unit="images") as advance:
        for done, second in ((1000, 1.0), (1010, 11.0)):
            clock[0] = second
            advance(Progress(done, 1010))
    assert "1.0 images/s" in capsys.readouterr().err


def test_json_logs_carry_progress_as_fields(capsys):
    with Console(json_logs=True) as console, console.progress("Converting") as advance:
        advance(Progress(5, 5))
    line = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert {name: line[name] for name in ("label", "done", "total", "unit")} == {
        "label": "Converting",
        "done": 5,
        "total": 5,
        "unit": "files",
    }


def test_a_terminal_shows_a_bar_with_the_figures_under_it(monkeypatch):
    shown = io.StringIO()
    screen = RichConsole(file=shown, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr("training.console.RichConsole", lambda **_: screen)
    with Console() as console, console.progress("Epoch 1 of 2", "images", lambda: "loss 0.5") as advance:
        assert console.live
        advance(Progress(120, 240))
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert "120/240 images" in plain
    assert "\n  loss 0.5" in plain


def test_a_log_that_cannot_be_written_ends_with_one_line_and_the_command_goes_on(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    with Console(directory=tmp_path / "run", quiet=True) as console:
        console.print("one")
        console.print("two")
    told = capsys.readouterr().err
    assert told.count("no more is logged here: ") == 1
    assert str(tmp_path / "run" / "run.log") in told
    assert "Traceback" not in told


@pytest.mark.parametrize(("seconds", "text"), [(8.6, "0:09"), (750, "12:30"), (11100, "3:05:00")])
def test_durations_read_like_a_clock(seconds, text):
    assert clock_text(seconds) == text


def test_a_run_tells_its_loss_while_an_epoch_runs(tmp_path, monkeypatch, capsys):
    fakes.use_fakes(monkeypatch)
    monkeypatch.setattr("training.console.PLAIN_EVERY_S", 0.0)
    store = fakes.make_store(tmp_path / "store")
    with Console() as console:
        fit.fit(fakes.small_config(), store, 0, tmp_path / "run", console=console)
    told = capsys.readouterr().err
    steps = [float(part) for part in re.findall(r"Epoch 1 of 2: .*step \d+, loss ([\d.]+)", told)]
    assert len(steps) == 12
    records = [json.loads(line) for line in (tmp_path / "run/fold0/metrics.jsonl").read_text().splitlines()]
    epoch = next(record for record in records if record["kind"] == "epoch")
    assert steps[-1] == pytest.approx(epoch["train_loss"], abs=1e-4)  # the same mean over the epoch so far
    assert re.search(r"Epoch 2 of 2: .* AUROC [01]\.\d+, best AUROC .*, run \d+:\d\d left", told)
    assert "Epoch 1 of 2, validation: 48 of 48 images" in told
