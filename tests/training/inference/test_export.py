"""Exported models: the same probabilities as torch's, at any batch, and predictions that need no training parts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from preprocessing.convert import convert
from preprocessing.errors import InputError, RunError, StoreError
from preprocessing.synth import synthesize
from tests.training.untrained import SETTINGS, make_run, spread_ages
from training import runs
from training.inference import export as export_module
from training.inference.assemble import open_ensemble
from training.inference.export import OnnxModel, export, open_exported
from training.inference.predict import predict

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "tiny"
    out.mkdir()
    (out / "fold7.safetensors").touch()  # of an earlier export of more folds
    summary = export(run, out)
    assert summary.folds == 2
    assert 0 <= summary.onnx_difference < 1e-4
    assert 0 <= summary.program_difference < 1e-4
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    synthesize(root, patients=1, test_patients=3, seed=5)
    convert(root / "test_images", root / "test.csv", root / "store", SETTINGS, workers=1)
    return root


def test_folds_that_were_validated_in_other_batches_are_exported_together(tmp_path: Path):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "fold1")
    shutil.move(make_run(tmp_path / "other", "data.loader.val_batch_size=8") / "fold1", run / "fold1")
    assert export(run, tmp_path / "out").folds == 2


def test_folds_of_other_pipelines_are_not(tmp_path: Path):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "fold1")
    shutil.move(make_run(tmp_path / "other", "pipeline.height=32") / "fold1", run / "fold1")
    with pytest.raises(RunError, match="different pipelines"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_both_forms_give_the_mean_of_the_folds_at_any_batch(run: Path, exported: Path, batch: int):
    picture = torch.randn(batch, 1, 64, 64, generator=torch.Generator().manual_seed(batch))
    models = [runs.load_model(fold)[0] for fold in runs.open_run(run).folds]
    with torch.inference_mode():
        wanted = torch.stack([torch.sigmoid(model(picture)) for model in models]).mean(dim=0).numpy()
        program = torch.export.load(exported / "model.pt2").module()(picture).numpy()
    onnx = OnnxModel(exported / "model.onnx", torch.device("cpu")).probabilities(picture.numpy())
    assert wanted.std() > 0 or batch == 1
    np.testing.assert_allclose(onnx, wanted, atol=1e-5)
    np.testing.assert_allclose(program, wanted, atol=1e-5)


def test_the_description_has_all_that_it_takes(run: Path, exported: Path):
    known = json.loads((exported / "model.json").read_text())
    ensemble = open_ensemble([run], "cpu")
    assert known["input"]["shape"] == ["batch", 1, 64, 64]
    assert (known["threshold"], known["prior"]) == (ensemble.threshold, ensemble.prior)
    assert set(known["sha256"]) == {"model.onnx", "model.pt2", "fold0.safetensors", "fold1.safetensors"}
    assert sorted(path.name for path in exported.iterdir()) == sorted([*known["sha256"], "model.json"])
    opened = open_exported(exported)
    assert opened.settings == ensemble.settings
    assert opened.groups[0].pipeline == ensemble.groups[0].pipeline


def test_an_export_that_fails_leaves_the_earlier_one(run: Path, exported: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(exported, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(export_module, "TOLERANCE", -1.0)
    with pytest.raises(RunError, match=r"as model\.onnx its probabilities differ from torch's.*nothing was written"):
        export(run, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *((name, None, f"{name}: ") for name in ("sha256", "pipeline", "loader", "conversion", "prior", "calibration")),
        ("aggregate", "bogus", "aggregate: "),
        ("aggregate", "power:x", "aggregate: "),
        ("prior", 1.5, "prior: "),
        ("calibration", {"method": "isotonic"}, "calibration: "),
        ("covariates", {"names": ["age"]}, "covariates: "),
    ],
)
def test_a_description_that_is_none_is_named(exported: Path, tmp_path: Path, name: str, value: object, said: str):
    shutil.copytree(exported, tmp_path / "out")
    path = tmp_path / "out" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(RunError, match=rf"model\.json: {said}.*Export the run again"):
        open_exported(tmp_path / "out", "cpu")


def test_a_description_of_another_size_than_the_model_is_named(exported: Path, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "out")
    path = tmp_path / "out" / "model.json"
    known = json.loads(path.read_text())
    known["pipeline"]["height"] = 32
    path.write_text(json.dumps(known))
    with pytest.raises(RunError, match=r"pipeline: not the size that model\.onnx takes, \(1, 64, 64\)"):
        open_exported(tmp_path / "out", "cpu")


def test_without_a_threshold_no_breast_is_called(exported: Path, data: Path, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "out")
    path = tmp_path / "out" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threshold": None}))
    source = {"folders": [], "models": [tmp_path / "out"], "store": data / "store", "device": "cpu"}
    predict(out=tmp_path / "s.csv", **source)
    with pytest.raises(InputError, match="--binary: no threshold was chosen"):
        predict(out=tmp_path / "binary.csv", binary=True, **source)


@pytest.mark.parametrize("tta", [False, True])
def test_a_submission_of_the_exported_model_is_that_of_the_run(
    run: Path, exported: Path, data: Path, tmp_path: Path, tta: bool
):
    for name, source in (("torch", {"folders": [run]}), ("onnx", {"folders": [], "models": [exported / "model.onnx"]})):
        summary = predict(**source, out=tmp_path / name / "s.csv", store=data / "store", device="cpu", tta=tta)
        assert summary.exit_code == 0
    torch_s, onnx_s = (pd.read_csv(tmp_path / name / "s.csv") for name in ("torch", "onnx"))
    assert torch_s["prediction_id"].tolist() == onnx_s["prediction_id"].tolist()
    np.testing.assert_allclose(onnx_s["cancer"], torch_s["cancer"], atol=1e-5)


def test_predicting_with_it_loads_neither_timm_nor_the_training_parts(exported: Path, data: Path, tmp_path: Path):
    script = f"""
import sys
from pathlib import Path
from training.inference.predict import predict
model, store, out = (Path(each) for each in {[str(exported), str(data / "store"), str(tmp_path / "s.csv")]})
predict([], out, models=[model], store=store, device="cpu")
loaded = {{"timm", "torchvision", "training.model", "training.loop", "training.build"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run(  # noqa: PLW1510
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s.csv").is_file()


def test_a_damaged_or_missing_model_is_refused_by_name(exported: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("model.onnx", "model.json"):
        (copy / name).write_bytes((exported / name).read_bytes())
    content = bytearray((copy / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.onnx").write_bytes(content)
    with pytest.raises(RunError, match=r"model\.onnx: its SHA-256"):
        open_exported(copy)
    (copy / "model.json").write_text('{"format": "other"}')
    with pytest.raises(RunError, match=r"model\.json: not an export"):
        open_exported(copy)
    (copy / "model.json").unlink()
    with pytest.raises(RunError, match=r"model\.json: no such file"):
        open_exported(copy)


def test_runs_and_a_model_or_explaining_a_model_are_refused(run: Path, exported: Path, data: Path, tmp_path: Path):
    with pytest.raises(InputError, match="not both"):
        predict([run], tmp_path / "s.csv", models=[exported], store=data / "store")
    with pytest.raises(InputError, match="--explain"):
        predict([], tmp_path / "s.csv", models=[exported], store=data / "store", explain=tmp_path / "x")


def test_a_store_converted_otherwise_is_refused(exported: Path, data: Path, tmp_path: Path):
    other = SETTINGS.model_copy(update={"crop_margin": 0.1})
    convert(data / "test_images", data / "test.csv", tmp_path / "store", other, workers=1)
    with pytest.raises(StoreError, match="crop_margin"):
        predict([], tmp_path / "s.csv", models=[exported], store=tmp_path / "store", device="cpu")


def test_the_calibration_goes_with_the_model_and_changes_the_submission(
    run: Path, exported: Path, data: Path, tmp_path: Path
):
    export(run, tmp_path / "export", "temperature")
    wanted = open_ensemble([run], "cpu", calibrate="temperature")
    opened = open_exported(tmp_path / "export")
    assert opened.calibration == wanted.calibration
    assert opened.calibration.temperature != 1
    assert opened.threshold == wanted.threshold
    cancers = []
    for name in (exported, tmp_path / "export"):
        predict([], tmp_path / "s.csv", models=[name], store=data / "store", device="cpu")
        cancers.append(pd.read_csv(tmp_path / "s.csv")["cancer"].to_numpy())
    np.testing.assert_allclose(cancers[1], opened.calibration(cancers[0]), atol=1e-9)
    with pytest.raises(InputError, match="--calibrate"):
        predict([], tmp_path / "s.csv", models=[exported], store=data / "store", calibrate="isotonic")


def test_several_models_are_averaged_each_with_its_own_calibration_and_covariates(
    run: Path, exported: Path, data: Path, tmp_path: Path
):
    other = spread_ages(make_run(tmp_path / "other", "pipeline.height=96", folds=1, seed=7))
    export(other, tmp_path / "export", "temperature", "max", ["age"])
    both = [exported, tmp_path / "export" / "model.onnx"]
    alone = []
    for model in both:
        predict([], tmp_path / "s.csv", models=[model], store=data / "store", device="cpu")
        alone.append(pd.read_csv(tmp_path / "s.csv"))
    fitted = {"calibrate": "temperature", "aggregate": "max"}
    for names, same in ((["age"], True), ([], False)):
        predict([other], tmp_path / "s.csv", covariates=names, store=data / "store", device="cpu", **fitted)
        by_run = pd.read_csv(tmp_path / "s.csv")
        assert np.allclose(by_run["cancer"], alone[1]["cancer"], atol=1e-5) == same
    predict([], tmp_path / "s.csv", models=both, weights=[1, 3], store=data / "store", device="cpu")
    found = pd.read_csv(tmp_path / "s.csv")
    np.testing.assert_allclose(found["cancer"], 0.25 * alone[0]["cancer"] + 0.75 * alone[1]["cancer"], atol=1e-6)
    settings = json.loads((tmp_path / "predictions_settings.json").read_text())
    assert [each["method"] for each in settings["own_calibrations"]] == ["none", "temperature"]
    assert [each["names"] for each in settings["covariates"]] == [[], ["age"]]
    assert settings["threshold"] is None
    for wrong, message in (({"binary": True}, "--binary"), ({"weights": "fitted"}, "--weights fitted")):
        with pytest.raises(InputError, match=message):
            predict([], tmp_path / "t.csv", models=both, store=data / "store", device="cpu", **wrong)
    with pytest.raises(InputError, match=r"expected 2 number\(s\)"):
        predict([], tmp_path / "t.csv", models=both, weights=[1], store=data / "store", device="cpu")


def test_models_of_differently_converted_stores_are_not_averaged(exported: Path, data: Path, tmp_path: Path):
    other = SETTINGS.model_copy(update={"crop_margin": 0.2})
    export(make_run(tmp_path / "run", folds=1, settings=other), tmp_path / "export")
    with pytest.raises(RunError, match="crop_margin"):
        predict([], tmp_path / "s.csv", models=[exported, tmp_path / "export"], store=data / "store", device="cpu")
