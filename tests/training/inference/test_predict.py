"""Prediction: a row for every breast whatever the pictures are like; through a store or straight from DICOM alike."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from preprocessing import ingest, workers
from preprocessing.convert import convert
from preprocessing.errors import InputError, RunError, StoreError
from preprocessing.manifest import Store, open_store
from preprocessing.progress import Progress
from preprocessing.synth import synthesize
from preprocessing.table import Source, read_table
from tests.training.untrained import PRIOR, SETTINGS, TINY, make_run
from training import run_files, runs
from training.config import Config, load_config
from training.fit import fit
from training.inference import intake
from training.inference.assemble import open_ensemble
from training.inference.ensemble import Ensemble, Member
from training.inference.partial import Part, Partial, unfinished
from training.inference.predict import PredictSummary, _open, predict
from training.inference.submission import PROBLEM_COLUMNS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures or so of seven patients, in every encoding that synth has, and their store."""
    root = tmp_path_factory.mktemp("data")
    synthesize(root, patients=1, test_patients=10, seed=5)
    table = pd.read_csv(root / "test.csv", dtype=str).sample(frac=1, random_state=1)  # not in the ids' order
    table.head(30).to_csv(root / "test.csv", index=False)
    convert(root / "test_images", root / "test.csv", root / "store", SETTINGS, workers=1)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def through_store(data: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("through_store") / "submission.csv"
    assert predict([run], out, store=data / "store", csv=data / "test.csv", device="cpu").exit_code == 0
    return out


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    """The raw pictures and their table, to be spoilt."""
    shutil.copytree(data / "test_images", tmp_path / "test_images")
    shutil.copy(data / "test.csv", tmp_path / "test.csv")
    return tmp_path


def _straight(root: Path, run: Path, name: str = "submission.csv", **options: object) -> tuple[PredictSummary, Path]:
    out = root / "out" / name
    summary = predict(
        [run], out, images=root / "test_images", csv=root / "test.csv", device="cpu", workers=1, **options
    )
    return summary, out


def _spoil(root: Path, images: list[str]) -> None:
    for path in root.rglob("*.dcm"):
        if path.stem in images:
            path.write_bytes(path.read_bytes()[:2000])


def _problems(out: Path) -> pd.DataFrame:
    return pd.read_csv(out.parent / "predictions_problems.csv", dtype=str, keep_default_na=False)


def _edit(root: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
    table = change(pd.read_csv(root / "test.csv", dtype=str, keep_default_na=False))
    table.to_csv(root / "test.csv", index=False)
    return table


def test_a_submission_has_one_row_a_breast_in_the_tables_order(data: Path, through_store: Path):
    table, submission = pd.read_csv(data / "test.csv"), pd.read_csv(through_store)
    assert list(submission.columns) == ["prediction_id", "cancer"]
    assert submission["prediction_id"].tolist() == table["prediction_id"].drop_duplicates().tolist()
    assert submission["cancer"].between(0, 1).all()
    assert submission["cancer"].nunique() == len(submission)
    pictures = pd.read_csv(through_store.parent / "predictions_images.csv")
    assert pictures["image_id"].tolist() == table["image_id"].tolist()
    means = pictures.groupby("prediction_id")["prediction"].mean()
    np.testing.assert_allclose(submission.set_index("prediction_id")["cancer"], means[submission["prediction_id"]])
    assert len(_problems(through_store)) == 0


def test_predictions_straight_from_dicom_equal_those_through_a_store_bit_for_bit(
    data: Path, run: Path, through_store: Path, tmp_path: Path
):
    out = tmp_path / "submission.csv"
    summary = predict([run], out, images=data / "test_images", csv=data / "test.csv", device="cpu", workers=2)
    assert summary.exit_code == 0
    for name in ("submission.csv", "predictions_images.csv", "predictions_problems.csv"):
        assert (tmp_path / name).read_bytes() == (through_store.parent / name).read_bytes()


def test_a_second_run_gives_the_same_bytes(data: Path, run: Path, through_store: Path, tmp_path: Path):
    predict([run], tmp_path / "submission.csv", store=data / "store", csv=data / "test.csv", device="cpu")
    assert (tmp_path / "submission.csv").read_bytes() == through_store.read_bytes()


def test_a_store_alone_gives_the_same_numbers_in_the_manifests_order(
    data: Path, run: Path, through_store: Path, tmp_path: Path
):
    predict([run], tmp_path / "submission.csv", store=data / "store", device="cpu")
    alone = pd.read_csv(tmp_path / "submission.csv")
    manifest = open_store(data / "store").manifest
    assert alone["prediction_id"].tolist() == manifest["prediction_id"].drop_duplicates().tolist()
    ours = pd.read_csv(through_store).set_index("prediction_id")["cancer"]
    assert alone.set_index("prediction_id")["cancer"].to_dict() == ours.to_dict()


def test_what_a_store_rejected_is_asked_for_with_what_its_table_said(copy: Path, run: Path):
    table = pd.read_csv(copy / "test.csv", dtype=str)
    first, second, *_ = table["prediction_id"].unique()
    lost = table[table["prediction_id"] == first]
    view = table[table["prediction_id"] == second].head(1)
    _spoil(copy, [*lost["image_id"], *view["image_id"]])
    convert(copy / "test_images", copy / "test.csv", copy / "store", SETTINGS, workers=1)
    assert predict([run], copy / "s.csv", store=copy / "store", device="cpu").exit_code == 3
    found = pd.read_csv(copy / "s.csv").set_index("prediction_id")["cancer"]
    assert sorted(found.index) == sorted(table["prediction_id"].unique())
    assert found[first] == pytest.approx(PRIOR)
    problems = _problems(copy / "s.csv").set_index("image_id")
    assert (
        problems["prediction_id"].to_dict() == pd.concat([lost, view]).set_index("image_id")["prediction_id"].to_dict()
    )
    pictures = pd.read_csv(copy / "predictions_images.csv", dtype=str).set_index("image_id")
    assert pictures.loc[lost["image_id"], "view"].tolist() == lost["view"].tolist()


def test_a_store_of_an_earlier_version_says_less_of_what_it_rejected(copy: Path, run: Path):
    table = pd.read_csv(copy / "test.csv", dtype=str)
    _spoil(copy, [table["image_id"].iloc[0]])
    convert(copy / "test_images", copy / "test.csv", copy / "store", SETTINGS, workers=1)
    path = copy / "store" / "rejected.csv"
    columns = ["image_id", "patient_id", "source_path", "reason", "detail"]
    pd.read_csv(path, dtype=str)[columns].to_csv(path, index=False)
    assert predict([run], copy / "s.csv", store=copy / "store", device="cpu").exit_code == 3
    assert _problems(copy / "s.csv")["image_id"].tolist() == [table["image_id"].iloc[0]]


def test_it_is_the_mean_of_the_folds_probabilities_on_the_runs_own_tensors(data: Path, run: Path, through_store: Path):
    from dali_pipes.loader import Loader

    opened = open_store(data / "store")
    rows = opened.manifest.reset_index(drop=True)
    config: Config = runs.open_run(run).folds[0].config
    expected = np.zeros(len(rows))
    with Loader(opened, rows, config.pipeline, config.data.loader, train=False, device="cpu") as loader:
        for batch in loader.epoch(0):
            for fold in runs.open_run(run).folds:
                model, _ = runs.load_model(fold)
                with torch.inference_mode():
                    expected[batch["index"].numpy()] += torch.sigmoid(model(batch["image"])).double().numpy() / 2
    pictures = pd.read_csv(through_store.parent / "predictions_images.csv", dtype={"image_id": str})
    found = pictures.set_index("image_id")["prediction"].loc[rows["image_id"]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.std() > 0.01


@pytest.mark.slow
def test_prediction_repeats_what_validation_saw_in_training(tmp_path: Path):
    synthesize(tmp_path / "data", patients=8, test_patients=0, seed=9)
    convert(tmp_path / "data/train_images", tmp_path / "data/train.csv", tmp_path / "store", SETTINGS, workers=1)
    config = load_config(
        None,
        (*TINY, "data.folds=2", "train.epochs=1", "train.max_steps=2", "data.loader.batch_size=4", "train.lr=0.01"),
    )
    fit(config, open_store(tmp_path / "store"), 1, tmp_path / "run", console=None)
    predict([tmp_path / "run/fold1"], tmp_path / "s.csv", store=tmp_path / "store", device="cpu")
    validated = runs.open_run(tmp_path / "run").folds[0].validation.set_index("image_id")["prediction"]
    found = pd.read_csv(tmp_path / "predictions_images.csv", dtype={"image_id": str}).set_index("image_id")
    assert 0 < len(validated) < len(found)
    np.testing.assert_allclose(found.loc[validated.index, "prediction"], validated, atol=1e-6)


def test_three_bad_images_of_thirty_cost_no_row(copy: Path, run: Path, through_store: Path):
    table = pd.read_csv(copy / "test.csv", dtype=str)
    one, *_, breast = table["prediction_id"].unique()
    lone = table.loc[table["prediction_id"] == one, "image_id"].iloc[0]
    both = table.loc[table["prediction_id"] == breast, "image_id"].tolist()
    bad = [lone, *both]
    _spoil(copy, bad)
    summary, out = _straight(copy, run)
    good, found = pd.read_csv(through_store), pd.read_csv(out)
    assert summary.exit_code == 3
    assert found["prediction_id"].tolist() == good["prediction_id"].tolist()
    # The other pictures come in other batches now, whose size may change a probability's last bits.
    changed = ~np.isclose(good["cancer"], found["cancer"], rtol=0, atol=1e-6)
    assert changed.sum() == 2 - (table["prediction_id"] == one).eq(False).all()
    assert found.set_index("prediction_id").loc[breast, "cancer"] == pytest.approx(PRIOR)
    pictures = pd.read_csv(out.parent / "predictions_images.csv", dtype={"image_id": str}).set_index("image_id")
    assert pictures.loc[bad, "prediction"].isna().all()
    assert pictures["prediction"].notna().sum() == len(table) - len(bad)
    problems = _problems(out).set_index("image_id")
    assert tuple(_problems(out).columns) == PROBLEM_COLUMNS
    assert sorted(problems.index) == sorted(bad)
    assert set(problems.loc[both, "fallback"]) == {"prior"}
    assert problems.loc[lone, "fallback"] == ("other views" if (table["prediction_id"] == one).sum() > 1 else "prior")
    assert (problems["reason"] != "").all()


def test_all_bad_images_leave_the_stated_prior(copy: Path, run: Path):
    table = pd.read_csv(copy / "test.csv", dtype=str)
    _spoil(copy, table["image_id"].tolist())
    summary, out = _straight(copy, run)
    found = pd.read_csv(out)
    assert summary.exit_code == 3
    assert (summary.from_prior, summary.problems) == (len(found), len(table))
    assert summary.prior == pytest.approx(PRIOR)
    assert found["prediction_id"].tolist() == table["prediction_id"].drop_duplicates().tolist()
    np.testing.assert_allclose(found["cancer"], PRIOR)
    assert "0.1667" in str(summary)


def test_an_absent_picture_is_named(copy: Path, run: Path):
    table = pd.read_csv(copy / "test.csv", dtype=str)
    gone = table["image_id"].iloc[3]
    next(copy.rglob(f"{gone}.dcm")).unlink()
    summary, out = _straight(copy, run)
    assert summary.exit_code == 3
    assert _problems(out)[["image_id", "reason"]].to_numpy().tolist() == [[gone, "absent"]]
    assert len(pd.read_csv(out)) == table["prediction_id"].nunique()


def test_a_picture_that_the_store_lacks_is_named(data: Path, copy: Path, run: Path):
    extra = {"patient_id": "77", "image_id": "7777", "laterality": "L", "view": "CC", "prediction_id": "77_L"}
    _edit(copy, lambda table: pd.concat([pd.DataFrame([extra]), table]).fillna(""))
    summary = predict([run], copy / "s.csv", store=data / "store", csv=copy / "test.csv", device="cpu")
    assert summary.exit_code == 3
    assert pd.read_csv(copy / "s.csv").iloc[0].tolist() == ["77_L", pytest.approx(PRIOR)]
    assert _problems(copy / "s.csv").iloc[0].tolist()[:3] == ["77_L", "7777", "absent"]


@pytest.mark.parametrize("text", ["", "patient_id,image_id,laterality,prediction_id\n"], ids=["no bytes", "no rows"])
def test_an_empty_table_is_refused_in_one_sentence(text: str, copy: Path, run: Path):
    (copy / "test.csv").write_text(text)
    with pytest.raises(InputError, match=r"test\.csv"):
        _straight(copy, run)
    assert not (copy / "out").exists()


def test_repeated_prediction_ids_make_one_row_and_shared_ones_are_named(copy: Path, run: Path):
    first = pd.read_csv(copy / "test.csv", dtype=str)["prediction_id"].unique()[:2]
    table = _edit(copy, lambda table: table.assign(prediction_id=table["prediction_id"].replace(first[1], first[0])))
    summary, out = _straight(copy, run)
    found, problems = pd.read_csv(out), _problems(out)
    assert found["prediction_id"].is_unique
    assert found["prediction_id"].tolist() == table["prediction_id"].drop_duplicates().tolist()
    assert summary.exit_code == 3
    assert set(problems["prediction_id"]) == {first[0]}
    assert set(problems["reason"]) == {"id"}
    assert sorted(problems["image_id"]) == sorted(table.loc[table["prediction_id"] == first[0], "image_id"])


def test_without_a_side_in_the_table_the_files_own_is_taken(copy: Path, run: Path, through_store: Path):
    _edit(copy, lambda table: table.drop(columns=["laterality", "prediction_id"]))
    summary, out = _straight(copy, run)
    assert summary.exit_code == 0
    assert out.read_bytes() == through_store.read_bytes()


def test_a_picture_without_any_side_keeps_a_row_of_its_own_and_is_named(copy: Path, run: Path, through_store: Path):
    import pydicom

    table = _edit(copy, lambda table: table.drop(columns=["laterality", "prediction_id"]))
    lost = table.iloc[0]
    path = copy / "test_images" / lost["patient_id"] / f"{lost['image_id']}.dcm"
    dataset = pydicom.dcmread(path)
    del dataset.ImageLaterality
    dataset.save_as(path)
    summary, out = _straight(copy, run)
    found, problems = pd.read_csv(out), _problems(out)
    assert summary.exit_code == 3
    assert found["prediction_id"].iloc[0] == f"{lost['patient_id']}_"
    assert problems[["image_id", "reason"]].to_numpy().tolist() == [[lost["image_id"], "laterality"]]
    assert set(pd.read_csv(through_store)["prediction_id"]) >= set(found["prediction_id"].iloc[1:])


def test_labels_in_the_table_change_nothing(copy: Path, run: Path, through_store: Path):
    _edit(copy, lambda table: table.assign(cancer="1"))
    _, out = _straight(copy, run)
    assert out.read_bytes() == through_store.read_bytes()


def test_a_folder_without_a_table_is_predicted_by_what_the_files_say(data: Path, run: Path, tmp_path: Path):
    images = tmp_path / "images"
    for path in sorted((data / "test_images").rglob("*.dcm"))[:6]:
        images.mkdir(exist_ok=True)
        shutil.copy(path, images)
    (images / "broken.dcm").write_bytes(b"no picture")
    summary = predict([run], tmp_path / "s.csv", images=images, device="cpu", workers=1)
    found, problems = pd.read_csv(tmp_path / "s.csv"), _problems(tmp_path / "s.csv")
    assert summary.exit_code == 3
    assert problems["image_id"].tolist() == ["broken"]
    assert len(pd.read_csv(tmp_path / "predictions_images.csv")) == 7
    assert problems["prediction_id"].tolist() == [""]  # nothing says whose breast it is: no row was asked for
    assert found["prediction_id"].str.fullmatch(r"p[0-9a-f]{16}_[LR]").all()


def test_a_picture_that_one_run_alone_cannot_read_has_no_prediction(data: Path, run: Path, tmp_path: Path):
    """Runs of larger pictures read another level, whose file may be sound."""
    shutil.copytree(data / "store", tmp_path / "store")
    store = open_store(tmp_path / "store")
    rows = store.manifest.head(3)
    (store.root / rows["path_96"].iloc[1]).write_bytes(b"")
    larger = make_run(tmp_path / "larger", "pipeline.height=192", "pipeline.width=192", folds=1)
    found, faults = open_ensemble([run, larger], "cpu").predict(store, rows)
    assert list(faults) == [1]
    np.testing.assert_array_equal(np.isnan(found), [[False] * 2, [True] * 2, [False] * 2])


def test_damaged_tiles_fall_back_and_are_named(data: Path, run: Path, tmp_path: Path, through_store: Path):
    store = tmp_path / "store"
    shutil.copytree(data / "store", store)
    row = open_store(store).manifest.iloc[2]
    tile = store / row["path_96"]
    spoilt = bytearray(tile.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    tile.write_bytes(bytes(spoilt))
    summary = predict([run], tmp_path / "s.csv", store=store, csv=data / "test.csv", device="cpu")
    assert summary.exit_code == 3
    (problem,) = _problems(tmp_path / "s.csv").to_dict("records")
    assert (problem["image_id"], problem["reason"]) == (row["image_id"], "damaged")
    assert "CRC-32" in problem["detail"]
    before = pd.read_csv(through_store).set_index("prediction_id")["cancer"]
    after = pd.read_csv(tmp_path / "s.csv").set_index("prediction_id")["cancer"]
    assert (before != after)[lambda changed: changed].index.tolist() == [row["prediction_id"]]


def test_runs_of_different_size_aggregation_and_weight_are_averaged_a_breast_at_a_time(
    data: Path, run: Path, through_store: Path, tmp_path: Path
):
    other = make_run(tmp_path / "other", "pipeline.height=96", "train.aggregate=max", folds=1, seed=7)
    source = {"store": data / "store", "csv": data / "test.csv", "device": "cpu"}
    predict([other], tmp_path / "other.csv", **source)
    pictures = pd.read_csv(tmp_path / "predictions_images.csv")
    alone = pd.read_csv(tmp_path / "other.csv")
    highest = pictures.groupby("prediction_id")["prediction"].max()
    np.testing.assert_array_equal(alone["cancer"], highest[alone["prediction_id"]])
    predict([run, other], tmp_path / "both.csv", weights=(1, 3), **source)
    both = pd.read_csv(tmp_path / "both.csv")
    expected = 0.25 * pd.read_csv(through_store)["cancer"] + 0.75 * alone["cancer"]
    np.testing.assert_allclose(both["cancer"], expected, rtol=1e-12)
    beside = [
        pd.read_csv(folder / "predictions_images.csv")["prediction"] for folder in (through_store.parent, tmp_path)
    ]
    np.testing.assert_allclose(beside[1], 0.25 * beside[0] + 0.75 * pictures["prediction"], rtol=1e-12)
    settings = json.loads((tmp_path / "predictions_settings.json").read_text())
    assert [(each["weight"], each["aggregate"]) for each in settings["runs"]] == [(0.25, "mean"), (0.75, "max")]
    assert settings["mirror_averaged"] is False


def test_a_submission_of_zeros_and_ones_is_cut_at_the_out_of_fold_threshold(
    data: Path, run: Path, through_store: Path, tmp_path: Path
):
    assert open_ensemble([run], "cpu").threshold == pytest.approx(0.5)  # midway between 0.3 and 0.7
    probabilities = pd.read_csv(through_store)["cancer"]
    cut = float(probabilities.median())
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run").glob("fold*/validation.csv"):
        table = pd.read_csv(path)
        table["prediction"] = cut + np.where(table["cancer"] == 1, 0.001, -0.001)
        table.to_csv(path, index=False)
    source = {"store": data / "store", "csv": data / "test.csv", "device": "cpu"}
    predict([tmp_path / "run"], tmp_path / "s.csv", binary=True, **source)
    found = pd.read_csv(tmp_path / "s.csv")["cancer"]
    assert found.tolist() == (probabilities >= cut).astype(int).tolist()
    assert set(found) == {0, 1}


def test_a_single_fold_can_be_named(data: Path, run: Path, tmp_path: Path, through_store: Path):
    parts = []
    for fold in ("fold0", "fold1"):
        predict([run / fold], tmp_path / f"{fold}.csv", store=data / "store", csv=data / "test.csv", device="cpu")
        parts.append(pd.read_csv(tmp_path / f"{fold}.csv")["cancer"])
    assert not np.allclose(parts[0], parts[1])
    np.testing.assert_allclose(pd.read_csv(through_store)["cancer"], (parts[0] + parts[1]) / 2, rtol=1e-12)


def test_mirror_images_are_averaged_in(data: Path, run: Path, tmp_path: Path, through_store: Path):
    source = {"store": data / "store", "csv": data / "test.csv", "device": "cpu"}
    predict([run], tmp_path / "tta.csv", tta=True, **source)
    plain, averaged = pd.read_csv(through_store)["cancer"], pd.read_csv(tmp_path / "tta.csv")["cancer"]
    assert (plain != averaged).any()
    ensemble = open_ensemble([run], "cpu")
    image = torch.randn(3, 1, 64, 64)
    member = ensemble.groups[0].members[0]
    with torch.inference_mode():
        once, mirrored = (ensemble.probabilities(member, each, False) for each in (image, image.flip(3)))
        both = ensemble.probabilities(member, image, True)
    torch.testing.assert_close(both, (once + mirrored) / 2)


def test_a_stream_cut_short_goes_on_to_the_same_bytes(
    data: Path, run: Path, through_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(intake, "_FIRST_ROWS", 8)
    out = tmp_path / "submission.csv"
    source = {"images": data / "test_images", "csv": data / "test.csv", "device": "cpu", "workers": 1}
    predicted: list[int] = []
    whole = Ensemble.predict

    def counted(self, store, rows, *rest):
        if len(predicted) == 2:
            raise KeyboardInterrupt
        predicted.append(len(rows))
        return whole(self, store, rows, *rest)

    monkeypatch.setattr(Ensemble, "predict", counted)
    with pytest.raises(KeyboardInterrupt):
        predict([run], out, **source)
    assert predicted == [8, 16]
    assert not out.exists()
    predicted.clear()
    seen: list[Progress] = []
    predict([run], out, progress=seen.append, **source)
    assert sum(predicted) == 30 - 24
    assert (seen[0].done, seen[-1].done) == (28, 30)
    names = ["predictions_images.csv", "predictions_problems.csv", "predictions_settings.json", "submission.csv"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (through_store.parent / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_chunks_count_on_from_where_a_stream_began_and_take_their_tiles_along(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(intake, "_FIRST_ROWS", 8)
    table = read_table(data / "test.csv", labels=False)
    with intake.stream(data / "test_images", table, True, SETTINGS, ("96",), 4, start=6, count=1) as chunks:
        first = next(chunks)
        tiles = [first.store.root / path for path in first.rows["path_96"]]
        assert (first.position, len(tiles)) == (14, 8)
        assert all(path.is_file() for path in tiles)
        second = next(chunks)
        assert second.position == 30
        assert not any(path.exists() for path in tiles)
    names = sorted(table["image_id"])
    assert [*first.rows["image_id"], *second.rows["image_id"]] == names[6:]


def test_levels_larger_than_any_model_reads_are_not_made():
    every = ("full", "1024", "512", "256")
    assert intake.levels_read(every, 512) == ("512", "256")
    assert intake.levels_read(every, 513) == ("1024", "512", "256")
    assert intake.levels_read(every, 1025) == every
    assert intake.levels_read(every, 200, {"full"}) == ("full", "256")


def test_a_stream_that_is_left_decodes_no_whole_chunk_first(tmp_path: Path):
    drawn: list[int] = []

    def outcomes():
        for number in range(1000):
            drawn.append(number)
            time.sleep(0.01)
            source = Source(f"{number:04d}", "", {})
            yield workers.Outcome(ingest.Job(tmp_path, tmp_path, SETTINGS, source), {"rejected": ["absent", ""]})

    stop, order = threading.Event(), [f"{number:04d}" for number in range(1000)]
    with intake._ahead(intake._chunks(outcomes(), order, 0, Store(tmp_path, SETTINGS), 4, stop), stop):
        while not drawn:
            time.sleep(0.01)
    assert len(drawn) < 100


def test_one_prediction_at_a_time_writes_a_submission(data: Path, run: Path, tmp_path: Path):
    """Another one's parts, of other models or options, would be taken for its own."""
    out = tmp_path / "submission.csv"
    with unfinished(out, "key") as one:
        one.add(Part(64, [], [], []))
        busy = re.escape(f"{out}: another prediction is being written there")
        with pytest.raises(InputError, match=busy):
            predict([run], out, store=data / "store", device="cpu")
        for key in ("key", "another key"):
            with pytest.raises(InputError, match=busy), unfinished(out, key):
                pass
        one.add(Part(192, [], [], []))
    with unfinished(out, "key") as found:
        assert [each.position for each in found.parts] == [64, 192]
        found.add(Part(192, [], [], []))  # crashes alone, which come after the last picture
    with unfinished(out, "key") as found:
        assert [each.position for each in found.parts] == [64, 192, 192]
        found.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "left"), [("0.json", 0), ("64.json", 64), ("key", 0)])
def test_a_damaged_part_is_made_anew(tmp_path: Path, name: str, left: int):
    out = tmp_path / "submission.csv"
    with unfinished(out, "key") as kept:
        kept.add(Part(64, [], [], []))
        kept.add(Part(128, [], [], []))
    (tmp_path / ".submission.csv.partial" / name).write_bytes(b'{"position": \xff')
    with unfinished(out, "key") as found:
        assert found.position == left


@pytest.mark.parametrize("name", ["predictions_images.csv", "predictions_problems.csv"])
def test_the_pictures_table_is_never_written_over(copy: Path, run: Path, name: str):
    (copy / "test.csv").rename(copy / name)
    before = (copy / name).read_bytes()
    with pytest.raises(InputError, match=f"{name}: this is the pictures' table"):
        predict([run], copy / "s.csv", images=copy / "test_images", csv=copy / name, device="cpu")
    with pytest.raises(InputError, match=f"{name}: another file of this name is written beside"):
        predict([run], copy / name, images=copy / "test_images", device="cpu")
    assert (copy / name).read_bytes() == before


def test_runs_with_batches_of_different_size_are_predicted_in_the_smallest(run: Path, tmp_path: Path):
    for name, size in (("a", 31), ("b", 29)):
        make_run(tmp_path / name, f"data.loader.val_batch_size={size}")
    opened = _open([tmp_path / "a", tmp_path / "b"], [], "cpu", None, "none", "run", None, None)
    assert opened.batch == 29


def test_weights_of_another_backbone_are_told_of(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "fold0" / "config.yaml"
    backbone = load_config(path).model.backbone
    path.write_text(path.read_text().replace(backbone, "resnet10t"))
    with pytest.raises(RunError, match=r"best\.safetensors: its weights are not those of resnet10t"):
        open_ensemble([tmp_path / "run" / "fold0"], "cpu")


def test_parts_of_another_prediction_are_not_taken_up(tmp_path: Path):
    out, part = tmp_path / "s.csv", Part(4, [{"image_id": "a"}], [[0.1 + 0.2, float("nan")]], [["b", "absent", "gone"]])
    with unfinished(out, "one key") as kept:
        kept.add(part)
    with unfinished(out, "one key") as again:
        assert again.position == 4
        assert again.parts[0].by_run[0][0] == 0.1 + 0.2
        assert np.isnan(again.parts[0].by_run[0][1])
    with unfinished(out, "another key") as other:
        assert other.parts == []
    assert not list(tmp_path.iterdir())


def test_overlays_are_drawn_of_pictures_over_the_threshold(data: Path, run: Path, through_store: Path, tmp_path: Path):
    pictures = pd.read_csv(through_store.parent / "predictions_images.csv", dtype={"image_id": str})
    threshold = float(pictures["prediction"].quantile(0.8))
    over = set(pictures.loc[pictures["prediction"] >= threshold, "image_id"])
    assert 0 < len(over) < len(pictures)
    predict(
        *([run], tmp_path / "s.csv"),
        store=data / "store",
        device="cpu",
        explain=tmp_path / "explained",
        explain_threshold=threshold,
    )
    assert {path.stem for path in (tmp_path / "explained").glob("*.png")} == over
    assert {path.stem for path in (tmp_path / "explained").glob("*.json")} == over


def test_progress_reaches_its_total(data: Path, run: Path, tmp_path: Path):
    seen: list[Progress] = []
    predict(
        [run],
        tmp_path / "s.csv",
        images=data / "test_images",
        csv=data / "test.csv",
        device="cpu",
        progress=seen.append,
    )
    assert [each.done for each in seen] == sorted(each.done for each in seen)
    assert (seen[-1].done, seen[-1].total) == (30, 30)


def test_a_store_converted_otherwise_is_refused(data: Path, tmp_path: Path):
    other = make_run(tmp_path / "run", folds=1, settings=SETTINGS.model_copy(update={"crop": False}))
    with pytest.raises(StoreError, match=r"crop = True.*crop = False"):
        predict([other], tmp_path / "s.csv", store=data / "store", device="cpu")


def test_tile_codec_and_size_do_not_matter_to_it(data: Path, tmp_path: Path):
    other = make_run(tmp_path / "run", folds=1, settings=SETTINGS.model_copy(update={"codec": "lzw", "tile": 64}))
    assert predict([other], tmp_path / "s.csv", store=data / "store", device="cpu").exit_code == 0


def test_runs_of_differently_converted_stores_are_refused(run: Path, tmp_path: Path):
    other = make_run(tmp_path / "run", folds=1, settings=SETTINGS.model_copy(update={"levels": ("full",)}))
    with pytest.raises(RunError, match="levels"):
        open_ensemble([run, other], "cpu")


@pytest.mark.parametrize("weights", [(1,), (3, -1), (0, 0), (1, float("nan"))])
def test_impossible_weights_are_refused(weights: tuple[float, ...], run: Path, tmp_path: Path):
    other = make_run(tmp_path / "run", folds=1)
    with pytest.raises(InputError, match="weights"):
        open_ensemble([run, other], "cpu", weights)


def test_an_unfinished_run_is_refused(run: Path, tmp_path: Path):
    begun = tmp_path / "begun"
    shutil.copytree(run, begun)
    (begun / "fold1" / runs.BEST).unlink()
    with pytest.raises(RunError, match="fold1"):
        open_ensemble([begun], "cpu")


def test_a_run_that_still_trains_is_told_of(run: Path, caplog: pytest.LogCaptureFixture):
    open_ensemble([run], "cpu")
    assert "Training has not finished" in caplog.text  # the summary, which `train` writes last, is not there
    caplog.clear()
    for fold in runs.open_run(run).folds:
        run_files.write_json(fold.folder / runs.SUMMARY, {})
    try:
        open_ensemble([run], "cpu")
    finally:
        for fold in runs.open_run(run).folds:
            (fold.folder / runs.SUMMARY).unlink()
    assert "Training has not finished" not in caplog.text


def test_patches_are_predicted_from_files_as_from_a_store(data: Path, tmp_path: Path):
    run = make_run(tmp_path / "run", "pipeline.patch_level='192'")
    for name, source in {"store": {"store": data / "store"}, "files": {"images": data / "test_images"}}.items():
        predict([run], tmp_path / f"{name}.csv", csv=data / "test.csv", device="cpu", **source)
    assert (tmp_path / "files.csv").read_bytes() == (tmp_path / "store.csv").read_bytes()


def test_labels_and_ages_that_are_none_do_not_stop_a_prediction(
    data: Path, run: Path, through_store: Path, tmp_path: Path
):
    table = pd.read_csv(data / "test.csv", dtype=str).assign(cancer="0.02", age="89+")
    table.to_csv(tmp_path / "test.csv", index=False)
    predict([run], tmp_path / "s.csv", images=data / "test_images", csv=tmp_path / "test.csv", device="cpu")
    assert (tmp_path / "s.csv").read_bytes() == through_store.read_bytes()


def test_what_was_trained_in_float16_predicts_on_a_cpu_in_float32(tmp_path: Path):
    ensemble = open_ensemble([make_run(tmp_path / "run", "train.precision=fp16")], "cpu")
    assert {member.precision for group in ensemble.groups for member in group.members} == {torch.float32}


def test_what_was_predicted_is_not_taken_up_when_a_file_has_changed_since(
    data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    images = tmp_path / "images"
    shutil.copytree(data / "test_images", images)
    first = min(images.rglob("*.dcm"), key=lambda path: path.stem)
    whole = first.read_bytes()
    first.write_bytes(whole[:2000])
    monkeypatch.setattr(intake, "_FIRST_ROWS", 8)
    out = tmp_path / "submission.csv"
    source = {"images": images, "csv": data / "test.csv", "device": "cpu", "workers": 1}
    kept, add = [], Partial.add

    def interrupted(self, part):
        add(self, part)
        kept.append(part.position)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict([run], out, **source)
    assert f"Stopped after {kept[-1]} pictures; the same command goes on from there." in caplog.text
    first.write_bytes(whole)
    assert predict([run], out, **source).problems == 0


@pytest.mark.parametrize("changed", ["mirrored", "trained anew", "converted otherwise"])
def test_what_was_predicted_otherwise_is_not_taken_up(
    changed: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make_run(tmp_path / "run", folds=1)
    monkeypatch.setattr(intake, "_FIRST_ROWS", 8)
    source = {"images": data / "test_images", "csv": data / "test.csv", "device": "cpu", "workers": 1}
    add = Partial.add

    def interrupted(self, part):
        add(self, part)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict([run], tmp_path / "cut.csv", **source)
    if changed == "trained anew":
        make_run(run, folds=1, seed=9)
    if changed == "converted otherwise":
        make_run(run, folds=1, settings=SETTINGS.model_copy(update={"crop_margin": 0.2}))
    for name in ("cut.csv", "whole.csv"):
        predict([run], tmp_path / name, tta=changed == "mirrored", **source)
    assert (tmp_path / "cut.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_what_is_written_can_be_told_apart_from_what_was_there(data: Path, run: Path, tmp_path: Path):
    """A failure in the middle leaves the old submission whole."""
    out = tmp_path / "submission.csv"
    out.write_text("old\n")
    with pytest.raises(RunError):
        predict([tmp_path / "no-run"], out, store=data / "store", device="cpu")
    assert out.read_text() == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["submission.csv"]
    predict([run], out, store=data / "store", device="cpu")
    assert hashlib.sha256(out.read_bytes()).hexdigest() != hashlib.sha256(b"old\n").hexdigest()
    assert not list(tmp_path.glob("*.tmp"))


def test_batches_that_do_not_fit_are_told_of_and_smaller_ones_give_the_same(
    data: Path, run: Path, through_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A simulated device that holds two pictures at a time."""
    own = Ensemble.probabilities

    def limited(self: Ensemble, member: Member, image: torch.Tensor, tta: bool = False) -> torch.Tensor:
        if len(image) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return own(self, member, image, tta)

    monkeypatch.setattr(Ensemble, "probabilities", limited)
    out = tmp_path / "submission.csv"
    arguments = {"store": data / "store", "csv": data / "test.csv", "device": "cpu"}
    with pytest.raises(RunError, match=r"Out of memory with batches of \d+ pictures.*--batch-size"):
        predict([run], out, **arguments)
    assert not list(tmp_path.iterdir())
    predict([run], out, batch_size=2, **arguments)
    found, wanted = pd.read_csv(out), pd.read_csv(through_store)
    assert found["prediction_id"].tolist() == wanted["prediction_id"].tolist()
    np.testing.assert_allclose(found["cancer"], wanted["cancer"], atol=1e-5)
