"""MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019) on a finished batch: each sample with another one of it.

Weights, boxes and partners are the plan's, like all randomness; with mixing on, the stream depends on the batch size
and the number of ranks; without it, it does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dali_pipes.plan import Mix, Mixing

Batch = dict[str, torch.Tensor]


def mix_batch(batch: Batch, mixing: Mixing) -> Batch:
    """The batch with its samples mixed; `label` becomes the mean of both labels, weighted as the pictures are.

    A sample is left as it is where it or its partner is damaged or has no label. `partner` int64 [B] is the row of each
    one's partner, as `index` is its own, and `weight` [B] in [0, 1] its own share, for whoever has more labels.

    Args:
        batch: `image` float32 [B, C, H, W], `label` float32 [B], `ok` bool [B] and more.
        mixing: of the batch.
    """
    image, label = batch["image"], batch["label"]
    keep, partner = _kept(mixing.mixes, *image.shape[2:]), torch.from_numpy(mixing.partners)
    if image.is_cuda:  # from pinned memory a copy does not wait for what is queued on the device
        keep, partner = (each.pin_memory().to(image.device, non_blocking=True) for each in (keep, partner))
    usable = batch["ok"] & ~torch.isnan(label)
    usable &= usable[partner]
    keep = torch.where(usable[:, None, None], keep, 1)
    mixed = torch.lerp(image[partner], image, keep[:, None])
    weight = keep.mean(dim=(1, 2), dtype=torch.float64).to(label.dtype)
    mixed_label = torch.where(usable, torch.lerp(label[partner], label, weight), label)
    return batch | {"image": mixed, "label": mixed_label, "partner": batch["index"][partner], "weight": weight}


def _kept(mixes: Sequence[Mix], height: int, width: int) -> torch.Tensor:
    """Share of itself that each sample keeps at each pixel, float32 [B, height, width]."""
    keep = torch.ones(len(mixes), height, width)
    for share, mix in zip(keep, mixes, strict=True):
        if mix.box is None:
            share.fill_(mix.weight)
        else:
            top, left, bottom, right = (
                round(edge * side) for edge, side in zip(mix.box, (height, width) * 2, strict=True)
            )
            share[top:bottom, left:right] = 0
    return keep
