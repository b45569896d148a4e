"""Other stores' pictures, to train on beside a store's own. None of them is validated on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pandas as pd

from preprocessing.errors import InputError, StoreError
from preprocessing.manifest import Store, level_column, open_store


def open_extra(store: Store, extra: Sequence[str]) -> list[Store]:
    """Other stores, whose pictures may be trained on beside those of `store`.

    Args:
        store: the store that is trained on and validated.
        extra: folders of the others.

    Raises:
        StoreError: no store there, or one whose conversion prepared the pictures otherwise.
        InputError: a picture, a patient or an image_id that is in another one of them too: it would be trained on
            twice, or trained on and validated, or taken for the other.
    """
    known = [store]
    for folder in extra:
        other = open_store(folder)
        if difference := other.settings.difference(store.settings):
            name, here, there = difference
            raise StoreError(
                f"data.extra_stores: {other.root} was converted with {name} = {here}, {store.root} with {name} = "
                f"{there}. Convert it with the same settings into another folder."
            )
        for each in known:
            _require_apart(other, each)
        known.append(other)
    return known[1:]


def labelled(others: Sequence[Store]) -> pd.DataFrame:
    """The labelled rows of one or more stores, their tiles by absolute paths, so that a loader of another store finds
    them; their `fold` is NaN."""
    parts = []
    for other in others:
        rows = other.manifest[other.manifest["cancer"].notna()]
        tiles = [level_column("path", level) for level in other.levels]
        paths = {name: f"{other.root.resolve()}/" + rows[name] for name in tiles}
        parts.append(rows.assign(**paths, fold=float("nan")))
    return pd.concat(parts, ignore_index=True)


def fingerprint(others: Sequence[Store]) -> str:
    """SHA-256 of the stores' fingerprints, in hexadecimal."""
    return hashlib.sha256("\n".join(other.fingerprint for other in others).encode()).hexdigest()


def _require_apart(other: Store, store: Store) -> None:
    rows, own = other.manifest, store.manifest
    twice = rows[rows["source_sha256"].isin(set(own["source_sha256"]) - {""})]
    if len(twice):
        raise InputError(
            f"data.extra_stores: picture {twice['image_id'].iloc[0]} of {other.root} is in {store.root} too, as "
            f"{len(twice)} of it are. Leave that store out, or convert it from a table without them."
        )
    for column, what, same in (("patient_id", "patient", "people"), ("image_id", "image_id", "pictures")):
        both = rows.loc[rows[column].isin(own[column]), column]
        if len(both):
            raise InputError(
                f"data.extra_stores: {what} {both.iloc[0]} is in {other.root} and in {store.root}, as {both.nunique()} "
                f"are. Leave them out of one table, or give one table other ids if they are not the same {same}; then "
                "convert it into another folder."
            )
