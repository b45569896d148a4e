"""Progressive resizing: early epochs on small pictures, which cost less, late ones on whole ones (Tan & Le 2021)."""

from __future__ import annotations

from dali_pipes.settings import PipelineSettings
from training.config import Config

MULTIPLE = 32  # pixels; what most backbones shrink a picture by


def training_pipeline(config: Config, epoch: int) -> PipelineSettings:
    """The pipeline of an epoch's training pictures.

    `train.progressive` divides the epochs into equal parts, each with its share of `pipeline.height` and `width`,
    rounded to whole multiples of 32 pixels, the side at most; of more shares than epochs the last ones count.
    Validation and prediction take the pipeline as it is.

    Args:
        config: the whole tree.
        epoch: from 0.
    """
    shares = config.train.progressive[-config.train.epochs :]
    if not shares:
        return config.pipeline
    share = shares[epoch * len(shares) // config.train.epochs]
    if share == 1:
        return config.pipeline
    sides = {side: getattr(config.pipeline, side) for side in ("height", "width")}
    sizes = {side: min(max(1, round(share * pixels / MULTIPLE)) * MULTIPLE, pixels) for side, pixels in sides.items()}
    return config.pipeline.model_copy(update=sizes)
