"""Pictures of other stores: they are trained on in every fold, come from their own tiles, and never leak."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from dali_pipes.loader import Loader
from dali_pipes.settings import LoaderSettings, PipelineSettings
from preprocessing.errors import InputError, RunError, StoreError
from preprocessing.manifest import open_store
from tests.dali_pipes import stores
from tests.training import fakes
from training import fit, runs
from training.extra import labelled, open_extra


@pytest.fixture
def store(tmp_path, monkeypatch):
    fakes.use_fakes(monkeypatch)
    return fakes.make_store(tmp_path / "store")


def make_other(root, patients=6, **columns):
    rows = fakes.make_rows(patients, seed=9).assign(**columns)
    for name in ("image_id", "patient_id", "prediction_id"):
        rows[name] = "x" + rows[name]
    return fakes.make_store(root, rows)


def config(*others, more=()):
    return fakes.small_config(f"data.extra_stores={json.dumps([str(each.root) for each in others])}", *more)


def test_every_fold_is_trained_on_them_and_none_is_validated_on_them(store, tmp_path):
    first, second = make_other(tmp_path / "first"), make_other(tmp_path / "second", 3)
    ids = {name: "y" + second.manifest[name] for name in ("patient_id", "image_id")}
    changed = second.manifest.assign(**ids, cancer=float("nan"))
    second = fakes.make_store(tmp_path / "third", changed)  # unlabelled: nothing to learn from
    for fold in range(2):
        alone, held_out = fit.split(store, fakes.small_config().data, fold)
        training, still_held_out = fit.split(store, config(first, second).data, fold)
        assert training["image_id"].tolist() == [*alone["image_id"], *first.manifest["image_id"]]
        assert training.index.tolist() == list(range(len(training)))
        assert still_held_out.equals(held_out)


def test_machines_and_sites_held_out_are_so_in_every_store(store, tmp_path):
    other = make_other(tmp_path / "other")
    training, _ = fit.split(store, config(other, more=("data.holdout_machines=[49]",)).data, 0)
    assert "49" in set(other.manifest["machine_id"])
    assert "49" not in set(training["machine_id"])
    assert training["image_id"].str.startswith("x").any()


def test_what_only_another_store_has_can_be_held_out_and_counts_as_unseen(store, tmp_path):
    own = store.manifest[store.manifest["machine_id"] != "48"]
    rows = own.assign(machine_id=own["machine_id"].replace("29", "49"))
    mixed = fakes.make_store(tmp_path / "mixed", rows)
    other = make_other(tmp_path / "other", machine_id="48", fold=1)
    training, _ = fit.split(mixed, config(other, more=("data.holdout_machines=[48]",)).data, 0)
    assert set(training["machine_id"]) == {"49"}
    fit.fit(config(other, more=("train.epochs=1",)), mixed, 0, tmp_path / "run")
    (fold,) = runs.open_run(tmp_path / "run").folds
    assert fold.environment.training.machines == ("49",)


def test_a_limit_leaves_some_of_every_part(store, tmp_path):
    other = make_other(tmp_path / "other")
    training, _ = fit.split(store, config(other, more=("data.max_images=8",)).data, 0)
    assert len(training) == 8
    assert training["fold"].isna().sum() == 4
    assert training["cancer"].sum() == 4


def test_their_pictures_come_from_their_own_tiles(tmp_path):
    def renamed(image):
        return {"image_id": f"x{image}", "patient_id": f"x{image // 4}", "source_sha256": f"x{image}"}

    own = stores.make_store(tmp_path / "own", count=4)
    other = stores.make_store(tmp_path / "other", count=7, codec="none", change=renamed)
    pipeline, settings = PipelineSettings(height=64, width=48), LoaderSettings(val_batch_size=7, threads=2)
    for cache in ("none", "host"):
        given = settings.model_copy(update={"cache": cache})
        with Loader(own, labelled(open_extra(own, [str(other.root)])), pipeline, given, train=False) as loader:
            (found,) = loader.epoch(0)
        with Loader(other, other.manifest, pipeline, settings, train=False) as loader:
            (expected,) = loader.epoch(0)
        assert found["ok"].all()
        assert torch.equal(found["image"], expected["image"])
        assert torch.equal(found["label"], expected["label"])


def test_what_would_leak_or_does_not_fit_is_refused(store, tmp_path):
    other = make_other(tmp_path / "other")
    cases = [
        ([store], InputError, r"patient p000 is in .*store and in .*store, as 24 are"),
        ([other, make_other(tmp_path / "again")], InputError, r"patient xp000 is in .*again and in .*other, as 6 are"),
    ]
    ids = make_other(tmp_path / "ids").manifest.assign(image_id=store.manifest["image_id"].iloc[:24].tolist())
    cases.append(
        ([fakes.make_store(tmp_path / "same", ids)], InputError, r"image_id 0000 is in .*same and in .*, as 24")
    )
    head = json.loads((other.root / "store.json").read_text())
    head["settings"]["crop_margin"] = 0.1
    shutil.copytree(other.root, tmp_path / "wider")
    (tmp_path / "wider" / "store.json").write_text(json.dumps(head))
    cases.append(
        ([open_store(tmp_path / "wider")], StoreError, r"wider was converted with crop_margin = 0\.1, .* 0\.01")
    )
    same = fakes.make_store(tmp_path / "files", fakes.make_rows().assign(source_sha256="abc"))
    copied = make_other(tmp_path / "copied", 2, source_sha256="abc")
    for others, kind, message in cases:
        with pytest.raises(kind, match=message):
            fit.split(store, config(*others).data, 0)
    with pytest.raises(InputError, match=r"picture x0000 of .*copied is in .*files too, as 8 of it are"):
        open_extra(same, [str(copied.root)])
    with pytest.raises(StoreError, match="none: no store there"):
        open_extra(store, [str(tmp_path / "none")])


def test_a_run_goes_on_with_the_pictures_that_it_was_begun_with_wherever_they_lie(store, tmp_path):
    other = make_other(tmp_path / "other")
    fit.fit(config(other, more=("train.epochs=1",)), store, 0, tmp_path / "run")
    (fold,) = runs.open_run(tmp_path / "run").folds
    assert fold.environment.training.model_extra["images"] == len(fit.split(store, config(other).data, 0)[0])
    assert fold.environment.training.model_extra["extra_stores"] == [str(other.root)]
    moved = open_store(other.root.rename(tmp_path / "moved"))
    assert not runs.mismatch(fold.folder, config(moved, more=("train.epochs=1",)), store)
    changed = moved.manifest.assign(cancer=1.0)
    for others in ([], [fakes.make_store(tmp_path / "changed", changed)]):
        with pytest.raises(RunError, match=r"data\.extra_stores: other pictures there than it was begun with"):
            fit.fit(config(*others, more=("train.epochs=1",)), store, 0, tmp_path / "run", resume=True)
