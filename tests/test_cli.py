"""The command line as a user meets it: instant help, the whole chain on a small data set, one line for bad input."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result

import cli
from preprocessing.errors import InputError, StoreError, UserError
from preprocessing.manifest import open_store

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--set=model.backbone=test_efficientnet",
    "--set=model.weights=none",
    "--set=pipeline.height=64",
    "--set=pipeline.width=64",
    "--set=data.folds=2",
    "--set=data.loader.batch_size=4",
    "--set=data.loader.val_batch_size=4",
    "--set=train.epochs=1",
    "--set=train.device=cpu",
]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in arguments], catch_exceptions=False)


def fails(*arguments: str | Path) -> str:
    """The one line that a call with bad input prints, after checking that it is one, with exit status 2."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.output
    assert "Traceback" not in result.output
    return errors[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted and split small data set: `rsna`, `store`."""
    root = tmp_path_factory.mktemp("cli")
    assert call("synth", "--out", root / "rsna", "--patients", 8, "--seed", 3, "-q").exit_code == 0
    images, table = root / "rsna" / "train_images", root / "rsna" / "train.csv"
    result = call("convert", "--images", images, "--csv", table, "--out", root / "store", "--levels", "512", "-q")
    assert result.exit_code == 0, result.output
    assert call("folds", "--store", root / "store", *TINY, "-q").exit_code == 0
    return root


@pytest.mark.parametrize(
    ("given", "there", "expected"),
    [("--images", None, "PASSIVE"), ("--images", "ACTIVE", "ACTIVE"), ("--store", None, None)],
)
def test_predicting_from_files_has_torchs_threads_sleep_between_layers(monkeypatch, tmp_path, given, there, expected):
    seen = []

    def stop(*_, **__):
        seen.append(os.environ.get("OMP_WAIT_POLICY"))
        raise InputError("enough")

    monkeypatch.setattr("training.inference.predict.predict", stop)
    monkeypatch.setenv("OMP_WAIT_POLICY", there or "")
    if there is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert "enough" in fails("predict", given, tmp_path, "--out", tmp_path / "s.csv")
    assert seen == [expected]


def test_ctrl_c_ends_a_command_with_the_status_that_a_shell_expects(monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.inference.predict.predict", stop)
    result = call("predict", "--store", tmp_path, "--out", tmp_path / "s.csv")
    assert (result.exit_code, result.stderr) == (130, "Stopped by Ctrl-C.\n")


def test_import_cli_loads_neither_torch_nor_dali():
    code = "import cli, sys; print([m for m in ('torch', 'nvidia.dali', 'pandas', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", sorted(cli.main.commands))
def test_every_command_explains_itself(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "--traceback" in result.output


def test_main_job_command_by_command(work):
    run, out = work / "runs", work / "submission.csv"
    trained = call("train", "--store", work / "store", "--fold", "all", "--out", run, *TINY, "-q")
    assert trained.exit_code == 0, trained.output
    assert (run / "fold0" / "checkpoints" / "best.safetensors").is_file()
    assert (run / "fold1" / "validation.csv").is_file()
    assert call("evaluate", "--store", work / "store", "--runs", run, "-q").exit_code == 0
    test = work / "rsna" / "test.csv"
    result = call(
        "predict", "--runs", run, "--images", work / "rsna" / "test_images", "--csv", test, "--out", out, "-q"
    )
    assert result.exit_code == 0, result.output
    asked = pd.read_csv(test, dtype=str)["prediction_id"].drop_duplicates().tolist()
    submission = pd.read_csv(out)
    assert list(submission.columns) == ["prediction_id", "cancer"]
    assert submission["prediction_id"].tolist() == asked
    assert submission["cancer"].between(0, 1).all()
    assert call("report", "--runs", run).exit_code == 0
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    assert call("verify", "--store", work / "store", "-q").exit_code == 0


def test_run_skips_what_is_done_and_unchanged(tmp_path):
    assert call("synth", "--out", tmp_path / "rsna", "--patients", 8, "--seed", 3, "-q").exit_code == 0
    data = tmp_path / "rsna"
    images, table = data / "train_images", data / "train.csv"
    made = call("convert", "--images", images, "--csv", table, "--out", tmp_path / "store", "--codec", "none", "-q")
    assert made.exit_code == 0, made.output  # a store keeps its own codec
    job = [
        *("run", "--images", data / "train_images", "--csv", data / "train.csv", "--store", tmp_path / "store"),
        *("--test-images", data / "test_images", "--test-csv", data / "test.csv", "--out", tmp_path / "run"),
        *("--submission", tmp_path / "submission.csv", *TINY, "-q"),
    ]
    first = call(*job)
    assert first.exit_code == 0, first.output
    assert "Unchanged" not in first.output
    made = (tmp_path / "submission.csv").read_bytes()
    second = call(*job)
    assert second.exit_code == 0, second.output
    assert "Unchanged, not done again: folds, train fold 0, train fold 1, evaluate, predict, report." in second.output
    (tmp_path / "submission.csv").unlink()
    third = call(*job)
    assert "train fold 0" in third.output.split("Unchanged")[1]
    assert (tmp_path / "submission.csv").read_bytes() == made

    absent = next((data / "test_images").rglob("*.dcm"))
    absent.rename(tmp_path / "kept.dcm")
    assert call(*job).exit_code == 3
    assert "predict" not in call(*job).output.split("Unchanged")[1]  # tried again as long as something falls back
    (tmp_path / "kept.dcm").rename(absent)
    assert call(*job).exit_code == 0
    assert (tmp_path / "submission.csv").read_bytes() == made

    # Other folds: what was trained on the old ones is set aside.
    shutil.copytree(tmp_path / "run" / "fold1", tmp_path / "run" / "fold2")
    before = (tmp_path / "run" / "fold0" / "validation.csv").read_bytes()
    assert call("folds", "--store", tmp_path / "store", *TINY, "--set=data.seed=7", "-q").exit_code == 0
    other = call(*job)
    assert other.exit_code == 0, other.output
    assert (tmp_path / "run" / "fold0" / "validation.csv").read_bytes() != before
    (aside,) = (tmp_path / "run").glob("fold0.replaced-*")
    assert (aside / "validation.csv").read_bytes() == before
    assert not (tmp_path / "run" / "fold2").exists()

    # What the table says of the patients, corrected: judged and predicted anew, and not trained.
    corrected = pd.read_csv(table, dtype=str).assign(age="61", site_id="7")
    corrected.to_csv(table, index=False)
    predictions = (tmp_path / "run" / "fold0" / "validation.csv").read_bytes()
    assert "train fold 0, train fold 1" in call(*job).output.split("Unchanged")[1].split("evaluate")[0]
    validation = pd.read_csv(tmp_path / "run" / "fold0" / "validation.csv", dtype=str, keep_default_na=False)
    assert (set(validation["age"]), set(validation["site_id"])) == ({"61.0"}, {"7"})
    assert (tmp_path / "run" / "fold0" / "validation.csv").read_bytes() != predictions

    # A submission and folds that others wrote there: the one is written again, the others are used as they are.
    made = (tmp_path / "submission.csv").read_bytes()
    (tmp_path / "submission.csv").write_text("theirs")
    assert call(*job).exit_code == 0
    assert (tmp_path / "submission.csv").read_bytes() == made
    split = (tmp_path / "store" / "folds.csv").read_bytes()
    assert call(*job, "--out", tmp_path / "second", "--set=data.seed=11").exit_code == 0
    assert (tmp_path / "store" / "folds.csv").read_bytes() == split

    assert "tset.csv: no such CSV file" in fails(*job, "--test-csv", data / "tset.csv")


def test_the_augmentation_sheet_shows_what_the_settings_do(work, tmp_path):
    sheets = []
    for more in ((), ("--set", "pipeline.augment.enabled=false")):
        result = call("augment-preview", "--store", work / "store", "--out", tmp_path / "a.png", *more)
        assert result.exit_code == 0, result.output
        sheets.append((tmp_path / "a.png").read_bytes())
    assert sheets[0] != sheets[1]
    told = fails("augment-preview", "--store", work / "store", "--set", "pipeline.patch_level=4096")
    assert "pipeline.patch_level = '4096'" in told


@pytest.mark.parametrize("command", ["synth", "convert", "augment-preview"])
def test_output_that_cannot_be_written_is_one_line(work, tmp_path, command):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    options = {
        "synth": ["--patients", 1],
        "convert": ["--images", work / "rsna" / "train_images", "--csv", work / "rsna" / "train.csv"],
        "augment-preview": ["--store", work / "store"],
    }
    assert str(tmp_path / "file") in fails(command, "--out", out, *options[command], "-q")


def test_a_full_disk_is_one_line_that_names_the_file(work, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("preprocessing.files.os.fsync", full)
    shutil.copytree(work / "store", tmp_path / "store")
    told = fails("folds", "--store", tmp_path / "store", *TINY, "-q")
    assert told == f"Error: {tmp_path / 'store' / 'folds.csv'}: cannot be read or written: No space left on device."


def test_a_folder_is_no_submission(work, tmp_path):
    told = fails("predict", "--runs", tmp_path, "--store", work / "store", "--out", tmp_path, "-q")
    assert f"{tmp_path}: a folder; name the file to write" in told


def test_missing_folder_is_named(tmp_path):
    assert str(tmp_path / "nowhere") in fails("convert", "--images", tmp_path / "nowhere", "--out", tmp_path / "s")


def test_missing_column_and_empty_table_are_named(work, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("patient_id,laterality\n1,L\n", encoding="utf-8")
    images = work / "rsna" / "train_images"
    assert "image_id" in fails("convert", "--images", images, "--csv", table, "--out", tmp_path / "s")
    table.write_text("patient_id,image_id\n", encoding="utf-8")
    assert "t.csv" in fails("convert", "--images", images, "--csv", table, "--out", tmp_path / "s")


def test_duplicate_image_ids_are_named(work, tmp_path):
    rows = pd.read_csv(work / "rsna" / "train.csv", dtype=str)
    table = tmp_path / "t.csv"
    pd.concat([rows, rows.iloc[[0]]]).to_csv(table, index=False)
    message = fails("convert", "--images", work / "rsna" / "train_images", "--csv", table, "--out", tmp_path / "s")
    assert rows["image_id"][0] in message


def test_convert_names_the_codec_for_a_gpu_where_there_is_one_and_none_was_chosen(work, tmp_path, monkeypatch):
    arguments = ("convert", "--images", work / "rsna" / "train_images", "--levels", "512", "-q")
    header, first, _ = (work / "rsna" / "train.csv").read_text().split("\n", 2)
    (tmp_path / "one.csv").write_text(f"{header}\n{first}\n")
    for there in (True, False):
        monkeypatch.setattr("preprocessing.gpu_decode.gpu_answers", lambda there=there: there)
        for more in ((), ("--codec", "zstd")):
            out = tmp_path / f"{there}{len(more)}"
            result = call(*arguments, "--csv", tmp_path / "one.csv", "--out", out, *more)
            assert ("--codec htj2k" in result.output) == (there and not more), result.output


def test_absent_image_is_converted_without_and_listed(work, tmp_path):
    rows = pd.read_csv(work / "rsna" / "train.csv", dtype=str).head(4)
    rows.loc[1, "image_id"] = "999999999"
    rows.to_csv(tmp_path / "t.csv", index=False)
    images, out = work / "rsna" / "train_images", tmp_path / "s"
    result = call("convert", "--images", images, "--csv", tmp_path / "t.csv", "--out", out, "--levels", "512", "-q")
    assert result.exit_code == 0, result.output
    rejected = pd.read_csv(out / "rejected.csv", dtype=str)
    assert rejected["image_id"].tolist() == ["999999999"]
    assert len(pd.read_parquet(out / "manifest.parquet")) == 3


def test_store_of_another_version_is_refused(work, tmp_path):
    (tmp_path / "store.json").write_text('{"version": 99, "settings": {}}', encoding="utf-8")
    assert "version 99" in fails("verify", "--store", tmp_path)


def test_missing_store_says_how_to_make_one(tmp_path):
    assert "cli.py convert" in fails("train", "--store", tmp_path / "none", "--out", tmp_path / "r")


@pytest.mark.parametrize(
    ("called", "typed"),
    [("/checkout/cli.py", "python cli.py convert --out"), ("/env/bin/mammopipe", "mammopipe convert --out")],
)
def test_advice_names_commands_as_they_are_typed(tmp_path, monkeypatch, called, typed):
    monkeypatch.setattr("sys.argv", [called, "verify"])
    with pytest.raises(StoreError, match=f": {typed}"):
        open_store(tmp_path / "none")


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    message = fails("predict", "--images", tmp_path, "--weights", "1;2", "--out", tmp_path / "s.csv")
    assert "--weights 1;2: expected numbers" in message


def test_unknown_fold_names_those_that_exist(work, tmp_path):
    message = fails("train", "--store", work / "store", "--fold", "7", "--out", tmp_path / "r", *TINY)
    assert "7" in message
    assert "0, 1" in message


@pytest.mark.parametrize("setting", ["train.lrr=1", "train.lr=fast", "train.lr=-1", "nonsense"])
def test_wrong_settings_are_named(work, tmp_path, setting):
    message = fails("train", "--store", work / "store", "--out", tmp_path / "r", "--set", setting)
    assert setting.split("=")[0] in message
    assert not (tmp_path / "r").exists()


def test_every_setting_of_a_conversion_can_be_set(work, tmp_path):
    images = work / "rsna" / "test_images"
    told = ("convert", "--images", images, "--out", tmp_path / "store", "--codec", "none", "-q")
    assert "--set: unknown setting 'max_pixelz'" in fails(*told, "--set", "max_pixelz=1")
    assert "memory_mb" in fails(*told, "--set", "memory_mb=little")
    assert "timeout_s" in fails(*told, "--set", "timeout_s=.inf")
    assert "--set codec=zstd: the option for codec is given too" in fails(*told, "--set", "codec=zstd")
    assert not (tmp_path / "store").exists()
    small = call(*told, "--set", "max_pixels=100", "--set", "tile=64")
    rejected = pd.read_csv(tmp_path / "store" / "rejected.csv")
    assert set(rejected["reason"]) == {"too_large"}, small.output
    assert "tile = 64" in fails(*told), "a store keeps what changes its bytes"
    assert call(*told, "--set", "tile=64").exit_code == 0
    store = open_store(tmp_path / "store")
    assert (len(store.manifest), store.settings.tile) == (len(rejected), 64)


def test_what_is_explained_can_be_chosen(monkeypatch, tmp_path):
    asked = {}

    def predict(*arguments, **told):
        asked.update(told)
        raise UserError("enough")

    monkeypatch.setattr("training.inference.predict.predict", predict)
    fails("predict", "--explain", tmp_path, "--explain-threshold", "0.02", "--explain-method", "gradcam")
    assert (asked["explain"], asked["explain_threshold"], asked["explain_method"]) == (tmp_path, 0.02, "gradcam")


@pytest.mark.parametrize("option", ["--explain-threshold=0.2", "--explain-method=gradcam"])
def test_how_to_explain_is_refused_where_nothing_is_explained(tmp_path, option):
    assert f"{option.partition('=')[0]} goes with --explain" in fails("predict", option, "--out", tmp_path / "s.csv")


def test_traceback_is_shown_on_request(tmp_path):
    with pytest.raises(Exception, match="no store there"):
        call("verify", "--store", tmp_path / "none", "--traceback")
