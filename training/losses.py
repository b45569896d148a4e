"""Losses: focal or weighted cross-entropy for cancer, masked cross-entropies for the auxiliary heads.

Damaged samples (`ok` False) and unknown labels (NaN, or -1 for a class) take no part: they neither add to the sum nor
to the count that it is divided by. Nothing here waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from preprocessing.errors import ConfigError
from training.config import ModelSettings, TrainSettings
from training.distributed import World

log = logging.getLogger(__name__)

# What the manifest's values mean to each auxiliary head; anything else is unknown and takes no part.
AUX_VALUES: dict[str, dict[str, int]] = {
    "density": {"A": 0, "B": 1, "C": 2, "D": 3},
    "BIRADS": {"0": 0, "1": 1, "2": 2},
    "invasive": {"0": 0, "1": 1},
    "view": {"CC": 0, "MLO": 1},
}


def build_loss(
    train: TrainSettings,
    model: ModelSettings,
    drawn: Mapping[str, int],
    aux_targets: Mapping[str, Tensor] | None = None,
    world: World | None = None,
) -> Loss:
    """The loss that the settings describe.

    Args:
        train, model: settings of the loss, and the auxiliary heads with their weight.
        drawn: how many samples of each class an epoch draws, {"negative", "positive"}; for class_weights=balanced.
        aux_targets: classes of every picture by head, int64 [N] on the training device; see `aux_targets`.
        world: the processes that train together; without it there is one.
    """
    positive_weight = 1.0
    if train.class_weights == "balanced":
        positive_weight = drawn["negative"] / max(drawn["positive"], 1)
    elif not isinstance(train.class_weights, str):
        positive_weight = float(train.class_weights)
    return Loss(train, model, positive_weight, dict(aux_targets or {}), world or World())


class Loss:
    """`loss(outputs, batch)` is the mean over the usable samples of the global batch, a scalar tensor."""

    def __init__(
        self,
        train: TrainSettings,
        model: ModelSettings,
        positive_weight: float,
        targets: dict[str, Tensor],
        world: World,
    ) -> None:
        self.train, self.model = train, model
        self.positive_weight = positive_weight
        self.targets = targets
        self.world = world

    def __call__(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch.

        Args:
            outputs: what `MammoModel.outputs` gives; logits [B] under `cancer`, [B, classes] under each head's name.
            batch: what the Loader gives: `label` [B], `ok` [B], `index` [B], and of mixed pictures `partner` [B] and
                `weight` [B].
        """
        known = batch["ok"] & ~torch.isnan(batch["label"])
        total = self._mean(self.per_sample(outputs["cancer"], batch["label"].nan_to_num()), known)
        for name in self.model.aux:
            losses, known_class = self._of_class(name, outputs[name], batch["index"])
            if "partner" in batch:
                of_partner, known_too = self._of_class(name, outputs[name], batch["partner"])
                weight = batch["weight"]
                losses = weight * losses + (1 - weight) * of_partner
                known_class &= known_too | (weight == 1)
            total = total + self.model.aux_weight * self._mean(losses, batch["ok"] & known_class)
        return total

    def _of_class(self, name: str, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """An auxiliary head's cross-entropy for the classes of these rows, and whether they are known, both [B]."""
        target = self.targets[name][rows]
        return F.cross_entropy(logits, target.clamp(min=0), reduction="none"), target >= 0

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each sample, [B]; labels in [0, 1].

        Focal: Lin et al. 2017, equation 5 (the positive class's weight multiplies it). For labels between 0 and 1, of
        smoothing or mixed pictures, 1 - p_t becomes |label - p| (the quality focal loss of Li et al. 2020): the loss
        then is least where p is the label, as cross-entropy's is.
        """
        smoothed = labels * (1 - self.train.label_smoothing) + 0.5 * self.train.label_smoothing
        losses = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
        if self.train.loss == "focal":
            if self.train.focal_gamma:
                losses = losses * (smoothed - torch.sigmoid(logits)).abs() ** self.train.focal_gamma
            if self.train.focal_alpha >= 0:
                losses = losses * (self.train.focal_alpha * smoothed + (1 - self.train.focal_alpha) * (1 - smoothed))
        return losses * (1 + (self.positive_weight - 1) * labels)

    def _mean(self, losses: Tensor, known: Tensor) -> Tensor:
        """Mean over known samples of all processes.

        DistributedDataParallel averages gradients over the processes; each part is scaled so that this average is the
        gradient of the global batch's mean, whatever share of the known samples each process has.
        """
        # where, not a product: an unusable sample's loss may be NaN, and 0 x NaN is NaN.
        total = torch.where(known, losses, torch.zeros_like(losses)).sum()
        count = self.world.sum(known.sum().float())
        return total * self.world.size / count.clamp(min=1)


def aux_targets(rows: pd.DataFrame, names: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
    """Classes of each row by auxiliary head, int64 [N], -1 where unknown.

    Raises:
        ConfigError: a head is asked for whose column the store lacks or whose values are all unknown.
    """
    targets = {}
    for name in names:
        known = AUX_VALUES[name]
        if name not in rows:
            raise ConfigError(f"model.aux names '{name}', but the store has no such column; leave it out of model.aux.")
        values = rows[name].map(_as_key).map(known)
        if values.isna().all():
            raise ConfigError(
                f"model.aux names '{name}', but none of the store's values is one of {', '.join(known)}; leave it out."
            )
        targets[name] = torch.from_numpy(values.fillna(-1).to_numpy(np.int64, copy=True)).to(device)
    return targets


def _as_key(value: object) -> str:
    """A cell as the tables above spell it: 1.0, '1.0' and 1 are '1'."""
    text = str(value).strip()
    return text.removesuffix(".0")
