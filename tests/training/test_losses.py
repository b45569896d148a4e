"""Losses against their formulas, and what takes no part in them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from preprocessing.errors import ConfigError
from training.config import ModelSettings, TrainSettings
from training.distributed import World
from training.losses import aux_targets, build_loss

DRAWN = {"negative": 90, "positive": 10}
CPU = torch.device("cpu")


def _loss(aux=None, names=(), **settings):
    return build_loss(TrainSettings(**settings), ModelSettings(aux=names), DRAWN, aux)


def _batch(labels, ok=None):
    count = len(labels)
    return {
        "label": torch.tensor(labels, dtype=torch.float32),
        "ok": torch.ones(count, dtype=torch.bool) if ok is None else torch.tensor(ok),
        "index": torch.arange(count),
    }


LOGITS = torch.tensor([-2.0, 0.3, 1.5, -0.4])
LABELS = [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.75, 1.0), (-1, 2.0), (0.25, 0.0), (0.0, 2.0)])
def test_focal_loss_is_the_papers_formula(alpha, gamma):
    p = torch.sigmoid(LOGITS).double()
    y = torch.tensor(LABELS).double()
    pt = torch.where(y == 1, p, 1 - p)
    at = torch.where(y == 1, alpha, 1 - alpha) if alpha >= 0 else torch.ones_like(p)
    expected = (-at * (1 - pt) ** gamma * pt.log()).mean()
    found = _loss(loss="focal", focal_alpha=alpha, focal_gamma=gamma)({"cancer": LOGITS}, _batch(LABELS))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("class_weights", "weight"), [("none", 1.0), ("balanced", 9.0), (3.5, 3.5)])
def test_cross_entropy_weighs_positives(class_weights, weight):
    expected = F.binary_cross_entropy_with_logits(LOGITS, torch.tensor(LABELS), pos_weight=torch.tensor(weight))
    found = _loss(loss="bce", class_weights=class_weights)({"cancer": LOGITS}, _batch(LABELS))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_label_smoothing_moves_labels_towards_a_half():
    smooth = torch.tensor(LABELS) * 0.8 + 0.1
    expected = F.binary_cross_entropy_with_logits(LOGITS, smooth)
    found = _loss(loss="bce", label_smoothing=0.2)({"cancer": LOGITS}, _batch(LABELS))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_a_positives_weight_multiplies_its_whole_loss_and_no_negatives_smoothed_or_not():
    smoothed = _loss(loss="bce", label_smoothing=0.2).per_sample(LOGITS, torch.tensor(LABELS))
    weighed = _loss(loss="bce", label_smoothing=0.2, class_weights=3.5).per_sample(LOGITS, torch.tensor(LABELS))
    assert (weighed / smoothed).tolist() == pytest.approx([1, 3.5, 3.5, 1])


class _TwoProcesses(World):
    """The other process has two known samples of the global batch's six."""

    def sum(self, value):
        return value + 2


def test_two_processes_gradients_average_to_that_of_the_global_mean():
    """DistributedDataParallel halves their sum, so that each process's part is of its sum over half of all."""
    loss = build_loss(TrainSettings(), ModelSettings(), DRAWN, world=_TwoProcesses(0, 2))
    alone = _loss().per_sample(LOGITS, torch.tensor(LABELS))
    assert float(loss({"cancer": LOGITS}, _batch(LABELS))) == pytest.approx(float(alone.sum()) * 2 / (4 + 2))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("label", "smoothing", "least"), [(1.0, 0.2, 0.9), (0.0, 0.1, 0.05), (0.7, 0.0, 0.7)])
def test_the_focal_loss_is_least_at_a_smoothed_or_mixed_label(gamma, label, smoothing, least):
    p = torch.linspace(0.01, 0.99, 99)
    settings = {"focal_gamma": gamma, "label_smoothing": smoothing}
    losses = _loss(loss="focal", **settings).per_sample(torch.logit(p), torch.full_like(p, label))
    assert float(p[losses.argmin()]) == pytest.approx(least, abs=0.001)


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_damaged_and_unlabelled_samples_take_no_part_and_leave_no_gradient(loss):
    logits = torch.tensor([*LOGITS.tolist(), 40.0, 5.0], requires_grad=True)
    batch = _batch([*LABELS, 1.0, float("nan")], ok=[True] * 4 + [False, True])
    function = _loss(loss=loss)
    found = function({"cancer": logits}, batch)
    assert found.item() == pytest.approx(function({"cancer": LOGITS}, _batch(LABELS)).item(), rel=1e-6)
    found.backward()
    assert logits.grad is not None
    assert logits.grad[4:].tolist() == [0, 0]
    assert (logits.grad[:4] != 0).all()


def test_a_loss_stays_finite_where_that_of_a_damaged_sample_is_not():
    logits = torch.tensor([*LOGITS.tolist(), float("nan")])
    found = _loss()({"cancer": logits}, _batch([*LABELS, 0.0], ok=[True] * 4 + [False]))
    assert float(found) == pytest.approx(float(_loss()({"cancer": LOGITS}, _batch(LABELS))))


def test_a_batch_without_any_usable_sample_costs_nothing():
    found = _loss()({"cancer": LOGITS}, _batch([float("nan")] * 4))
    assert float(found) == 0


def _rows():
    return pd.DataFrame(
        {"density": ["A", "D", "", "B"], "BIRADS": [0.0, np.nan, 2.0, 1.0], "view": ["CC", "MLO", "AT", "CC"]}
    )


def test_auxiliary_classes_come_from_the_rows_and_unknown_ones_are_minus_one():
    targets = aux_targets(_rows(), ("density", "BIRADS", "view"), CPU)
    assert targets["density"].tolist() == [0, 3, -1, 1]
    assert targets["BIRADS"].tolist() == [0, -1, 2, 1]
    assert targets["view"].tolist() == [0, 1, -1, 0]


def test_auxiliary_losses_are_masked_cross_entropies_with_their_weight():
    targets = aux_targets(_rows(), ("density",), CPU)
    logits = torch.randn(4, 4)
    outputs = {"cancer": LOGITS, "density": logits}
    batch = _batch(LABELS, ok=[True, True, True, False])
    known = [0, 1]  # row 2 has no density, row 3 is damaged
    expected = F.cross_entropy(logits[known], targets["density"][known])
    alone = _loss()({"cancer": LOGITS}, batch)
    both = build_loss(TrainSettings(), ModelSettings(aux=("density",), aux_weight=0.3), DRAWN, targets)(outputs, batch)
    assert float(both - alone) == pytest.approx(0.3 * float(expected), rel=1e-5)


def test_auxiliary_classes_are_mixed_as_the_pictures_are():
    targets = aux_targets(_rows(), ("view",), CPU)
    loss = build_loss(TrainSettings(), ModelSettings(aux=("view",), aux_weight=1.0), DRAWN, targets)
    known = torch.nonzero(targets["view"] >= 0)[:, 0]
    of = {view: next(int(row) for row in known if targets["view"][row] == view) for view in (0, 1)}
    alone = {"label": torch.full((2,), float("nan")), "ok": torch.ones(2, dtype=torch.bool)}
    batch = {**alone, "index": torch.tensor([of[0], of[1]])}
    logits = torch.tensor([[2.0, -1.0], [0.5, 1.5]])
    outputs = {"cancer": torch.zeros(2), "view": logits}
    own, other = (F.cross_entropy(logits, torch.tensor(t), reduction="none") for t in ([0, 1], [1, 0]))
    weight = torch.tensor([0.25, 1.0])
    mixed = batch | {"partner": batch["index"].roll(-1), "weight": weight}
    expected = (weight * own + (1 - weight) * other).mean()
    assert loss(outputs, mixed) == pytest.approx(float(expected))
    assert loss(outputs, batch) == pytest.approx(float(own.mean()))


def test_a_picture_mixed_with_one_of_unknown_class_teaches_no_class():
    targets = aux_targets(_rows(), ("view",), CPU)  # row 2 has none
    loss = build_loss(TrainSettings(), ModelSettings(aux=("view",), aux_weight=1.0), DRAWN, targets)
    logits = torch.tensor([[2.0, -1.0], [0.5, 1.5], [3.0, 0.0]])
    batch = {
        **{"label": torch.full((3,), float("nan")), "ok": torch.ones(3, dtype=torch.bool)},
        **{"index": torch.tensor([0, 1, 3]), "partner": torch.tensor([2, 2, 1])},
        "weight": torch.tensor([0.5, 1.0, 1.0]),  # the second one is left as it is, so that its own class is known
    }
    expected = F.cross_entropy(logits[1:], torch.tensor([1, 0]))
    assert float(loss({"cancer": torch.zeros(3), "view": logits}, batch)) == pytest.approx(float(expected))


def test_an_auxiliary_head_without_a_column_or_values_is_refused():
    with pytest.raises(ConfigError, match="'invasive', but the store has no such column"):
        aux_targets(_rows(), ("invasive",), CPU)
    with pytest.raises(ConfigError, match="none of the store's values"):
        aux_targets(_rows().assign(density=""), ("density",), CPU)
