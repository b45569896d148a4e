"""What the learning benchmark does to a store before it trains."""

from __future__ import annotations

from benchmarks import learning
from preprocessing.manifest import open_store
from tests.training import fakes


def test_labels_are_dealt_out_anew_over_whole_patients(tmp_path):
    store = fakes.make_store(tmp_path / "store")
    (store.root / "tiles").mkdir()
    (store.root / "tiles" / "x").write_text("tile")
    other = learning.shuffled(store, tmp_path / "other", seed=1)
    before, after = store.manifest, other.manifest
    assert after.groupby("patient_id")["cancer"].nunique().max() == 1
    sick = before.groupby("patient_id")["cancer"].max()
    assert after.groupby("patient_id")["cancer"].max().sum() == sick.sum()
    assert (after.groupby("patient_id")["cancer"].max() != sick).any()
    assert (other.root / "tiles" / "x").read_text() == "tile"
    assert open_store(other.root).fingerprint != store.fingerprint
