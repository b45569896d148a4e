"""Cross-validation folds: StratifiedGroupKFold by patient, saved in the store as `folds.csv`.

Cancer is what the folds are stratified on. Site, machine and density come second: afterwards pairs of patients change
places between folds wherever that makes the folds more alike, cancer counting most.
"""

from __future__ import annotations

import hashlib
import logging
import warnings

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from preprocessing.errors import InputError, StoreError, command_line
from preprocessing.files import write_atomically
from preprocessing.manifest import Store
from training.config import DataSettings

log = logging.getLogger(__name__)

FOLDS_FILE = "folds.csv"
# How much each column counts when patients are exchanged between folds; cancer before all others.
_WEIGHTS = {"cancer": 10.0, "site_id": 1.0, "machine_id": 1.0, "density": 0.5}


def make_folds(store: Store, settings: DataSettings) -> pd.DataFrame:
    """Split the store's patients into folds and save them.

    Returns:
        A row an image of the manifest: `image_id` (str), `fold` (int, from 0).

    Raises:
        InputError: too few patients, or too few with or without cancer, for that many folds.
    """
    rows = store.manifest
    _check_patients(rows, settings.folds)
    assignment = _exchange(rows, _split(rows, settings), settings)
    folds = pd.DataFrame({"image_id": rows["image_id"].to_numpy(), "fold": assignment})
    check_leak(rows, folds)
    _check_classes(rows, assignment, settings.folds)
    write_atomically(store.root / FOLDS_FILE, folds.to_csv(index=False, lineterminator="\n").encode())
    return folds


def read_folds(store: Store) -> pd.DataFrame:
    """The saved folds, a row an image in the manifest's order.

    Raises:
        StoreError: no folds there, a damaged file, images without a fold, or a patient in two folds.
    """
    path = store.root / FOLDS_FILE
    again = f"Make them again with: {command_line(f'folds --store {store.root}')}"
    if not path.is_file():
        raise StoreError(f"{path}: no folds there. Make them with: {command_line(f'folds --store {store.root}')}")
    try:
        folds = pd.read_csv(path, dtype={"image_id": str, "fold": np.int64}, keep_default_na=False)
        folds = folds[["image_id", "fold"]]
    except (ValueError, KeyError, OverflowError):
        raise StoreError(f"{path}: expected the columns image_id and fold (a whole number). {again}") from None
    rows = store.manifest
    if folds["image_id"].duplicated().any():
        raise StoreError(f"{path}: an image is listed twice. {again}")
    folds = rows[["image_id"]].merge(folds, on="image_id", how="left", validate="many_to_one")
    lacking = int(folds["fold"].isna().sum())
    if lacking:
        raise StoreError(f"{path}: {lacking} of the store's {len(rows)} images have no fold there. {again}")
    folds["fold"] = folds["fold"].astype(np.int64)
    check_leak(rows, folds)
    return folds


def check_leak(rows: pd.DataFrame, folds: pd.DataFrame) -> None:
    """Raise a `StoreError` naming a patient whose images lie in two folds.

    Args:
        rows: `image_id`, `patient_id`; an image a row.
        folds: `image_id`, `fold`; the same images, in any order.
    """
    joined = rows[["image_id", "patient_id"]].merge(folds, on="image_id", validate="one_to_one")
    spread = joined.groupby("patient_id")["fold"].nunique()
    if (spread > 1).any():
        patient = spread.index[spread > 1][0]
        found = sorted(joined.loc[joined["patient_id"] == patient, "fold"].unique().tolist())
        raise StoreError(
            f"{FOLDS_FILE}: patient {patient} lies in folds {found}, so what is learnt from one would be tested on "
            f"the other; make the folds again with: {command_line('folds')}"
        )


def read_or_make_folds(store: Store, settings: DataSettings) -> pd.DataFrame:
    """The saved folds, made now (and said so in the log) where there are none."""
    if not (store.root / FOLDS_FILE).is_file():
        log.info("%s has no folds yet: splitting its patients into %d.", store.root, settings.folds)
        make_folds(store, settings)
    folds = read_folds(store)
    count = folds["fold"].nunique()
    if count != settings.folds:
        log.warning(
            "%s has %d folds, and data.folds = %d is not used. Make others with: %s",
            *(store.root / FOLDS_FILE, count, settings.folds),
            command_line(f"folds --store {store.root} --set data.folds={settings.folds}"),
        )
    return folds


def held_out_digest(store: Store, fold: int) -> str:
    """SHA-256 of the image_ids that a fold holds out, in hexadecimal: the same as long as the fold is."""
    folds = read_folds(store)
    held_out = sorted(folds.loc[folds["fold"] == fold, "image_id"])
    return hashlib.sha256("\n".join(held_out).encode()).hexdigest()


def describe_folds(store: Store, folds: pd.DataFrame) -> list[dict[str, str]]:
    """A row a fold for the screen: patients, breasts, images, those with cancer, sites and machines."""
    rows = store.manifest.merge(folds, on="image_id", validate="one_to_one")
    table = []
    for fold, part in rows.groupby("fold"):
        known = part["cancer"].notna()
        share = f"{part.loc[known, 'cancer'].mean():.2%}" if known.any() else "unknown"
        table.append(
            {
                "fold": str(fold),
                "patients": f"{part['patient_id'].nunique():,}",
                "breasts": f"{part['prediction_id'].nunique():,}",
                "images": f"{len(part):,}",
                "with cancer": f"{int((part['cancer'] == 1).sum()):,}",
                "share": share,
                "sites": str(part["site_id"].nunique()),
                "machines": str(part["machine_id"].nunique()),
            }
        )
    return table


def _check_patients(rows: pd.DataFrame, folds: int) -> None:
    patients = rows["patient_id"].nunique()
    sick = rows.loc[rows["cancer"] == 1, "patient_id"].nunique()
    healthy = rows.loc[rows["cancer"] == 0, "patient_id"].nunique()
    least = min(patients, sick, healthy)
    if least < folds:
        what = f"{patients} patients, {sick} of them with a cancer image and {healthy} with one without"
        advice = (
            f"set data.folds to {least} at most (--set data.folds={least})"
            if least >= 2
            else "bring more labelled data"
        )
        raise InputError(f"The store has {what}; {folds} folds need at least {folds} of each: {advice}.")


def _check_classes(rows: pd.DataFrame, assignment: np.ndarray, folds: int) -> None:
    for fold in range(folds):
        labels = rows.loc[assignment == fold, "cancer"]
        if not {0.0, 1.0} <= set(labels.dropna().unique().tolist()):
            raise InputError(
                f"Fold {fold} would hold {int((labels == 1).sum())} images with cancer and {int((labels == 0).sum())} "
                f"without; ask for fewer folds than {folds} (--set data.folds=...)."
            )


def _split(rows: pd.DataFrame, settings: DataSettings) -> np.ndarray:
    """StratifiedGroupKFold on cancer, grouped by patient; the fold of each row."""
    classes = pd.factorize(rows["cancer"], use_na_sentinel=False)[0]  # unknown is a class of its own
    splitter = StratifiedGroupKFold(settings.folds, shuffle=True, random_state=settings.seed)
    assignment = np.full(len(rows), -1, dtype=np.int64)
    with warnings.catch_warnings():
        # A handful of unlabelled images may be fewer than the folds.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for fold, (_, held_out) in enumerate(splitter.split(classes, classes, groups=rows["patient_id"])):
            assignment[held_out] = fold
    return assignment


def _exchange(rows: pd.DataFrame, assignment: np.ndarray, settings: DataSettings) -> np.ndarray:
    """Swap pairs of patients between folds while that brings the folds closer to each other; the fold of each row."""
    patients, names = pd.factorize(rows["patient_id"])
    counts = _counts(rows, patients, len(names))
    fold_of = np.zeros(len(names), dtype=np.int64)
    fold_of[patients] = assignment
    sums = np.zeros((settings.folds, counts.shape[1]))
    np.add.at(sums, fold_of, counts)
    generator = np.random.default_rng(settings.seed)
    for first, second in generator.integers(len(names), size=(min(40 * len(names), 100_000), 2)):
        one, other = fold_of[first], fold_of[second]
        if one == other:
            continue
        moved = counts[second] - counts[first]
        # The folds' spread around their mean, sum of squares, changes by 2 moved . (sums[one] - sums[other] + moved).
        if float(moved @ (sums[one] - sums[other] + moved)) < -1e-12:
            sums[one] += moved
            sums[other] -= moved
            fold_of[first], fold_of[second] = other, one
    return fold_of[patients]


def _counts(rows: pd.DataFrame, patients: np.ndarray, count: int) -> np.ndarray:
    """What each patient brings to a fold, [patients, features], each feature as a share of its column's whole.

    Features: images in all, those of each class of cancer, patients with cancer, images of each site, machine, density.
    """
    columns = [np.bincount(patients, minlength=count)[:, None] / len(rows)]
    for column, weight in _WEIGHTS.items():
        codes, values = pd.factorize(rows[column], use_na_sentinel=False)
        table = np.bincount(patients * len(values) + codes, minlength=count * len(values)).reshape(count, len(values))
        if column == "cancer":  # the positives are few: they count relative to themselves
            sick = (table[:, np.asarray(values) == 1]).sum(axis=1, keepdims=True)
            columns += [weight * sick / sick.sum(), weight * (sick > 0) / (sick > 0).sum()]
        columns.append(weight * table / len(rows))
    return np.hstack(columns)
