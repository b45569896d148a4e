"""What the loading pipeline can be told: windowing, CLAHE, geometry, augmentation, normalisation."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClaheSettings(_Settings):
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994) on windowed values."""

    enabled: bool = Field(default=True, description="Apply CLAHE after the window.")
    clip_limit: float = Field(default=2.0, gt=0, le=40, description="Contrast limit, as in OpenCV's createCLAHE.")
    grid: int = Field(default=8, ge=1, le=64, description="Tiles along each side.")


class AugmentSettings(_Settings):
    """Random changes of training pictures. Probabilities are per sample; validation and prediction use none."""

    enabled: bool = Field(default=True, description="Augment training pictures.")
    hflip: float = Field(default=0.5, ge=0, le=1, description="Probability of a left-right flip.")
    vflip: float = Field(default=0.25, ge=0, le=1, description="Probability of an upside-down flip.")
    affine: float = Field(
        default=0.7, ge=0, le=1, description="Probability of shift, scale and rotation (one affine warp)."
    )
    rotate_deg: float = Field(default=15.0, ge=0, le=180, description="Largest rotation to either side, in degrees.")
    shift: float = Field(
        default=0.06, ge=0, le=0.5, description="Largest shift along each axis, as a share of the side."
    )
    scale: float = Field(default=0.15, ge=0, lt=1, description="Largest relative change of size.")
    window: float = Field(default=0.5, ge=0, le=1, description="Probability of window jitter.")
    window_shift: float = Field(
        default=0.1, ge=0, le=1, description="Largest shift of the window centre, in window widths."
    )
    window_scale: float = Field(default=0.2, ge=0, lt=1, description="Largest relative change of the window width.")
    choose_window: bool = Field(
        default=True, description="Draw among the file's own windows instead of taking the first."
    )
    brightness: float = Field(default=0.1, ge=0, le=1, description="Largest change of brightness, in full ranges.")
    contrast: float = Field(default=0.1, ge=0, le=1, description="Largest relative change of contrast.")
    gamma: float = Field(default=0.2, ge=0, lt=1, description="Largest relative change of gamma.")
    tone: float = Field(default=0.5, ge=0, le=1, description="Probability of brightness, contrast and gamma changes.")
    noise: float = Field(default=0.2, ge=0, le=1, description="Probability of Gaussian noise.")
    noise_sigma: float = Field(
        default=0.03, ge=0, le=1, description="Largest standard deviation of the noise, in full ranges."
    )
    blur: float = Field(default=0.1, ge=0, le=1, description="Probability of Gaussian blur.")
    blur_sigma: float = Field(
        default=1.2, ge=0.3, le=10, description="Largest standard deviation of the blur, in pixels; the least is 0.3."
    )
    sharpen: float = Field(default=0.1, ge=0, le=1, description="Probability of sharpening (unsharp mask).")
    grid: float = Field(default=0.2, ge=0, le=1, description="Probability of grid distortion.")
    grid_steps: int = Field(default=5, ge=2, le=16, description="Cells of the distortion grid along each side.")
    grid_limit: float = Field(default=0.25, ge=0, lt=0.5, description="Largest shift of a grid node, in cells.")
    dropout: float = Field(default=0.25, ge=0, le=1, description="Probability of coarse dropout.")
    dropout_holes: int = Field(default=8, ge=1, le=64, description="Largest number of holes.")
    dropout_size: float = Field(
        default=0.12, gt=0, le=0.5, description="Largest side of a hole, as a share of the picture's."
    )
    grid_dropout: float = Field(default=0.0, ge=0, le=1, description="Probability of grid dropout.")
    mixup: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Alpha of MixUp's Beta distribution, between samples of a batch; 0 is off.",
    )
    cutmix: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Alpha of CutMix's Beta distribution, between samples of a batch; 0 is off.",
    )


class PipelineSettings(_Settings):
    """From tiles to training tensors. A run keeps them: prediction uses the run's own."""

    height: int = Field(default=512, ge=32, le=4096, description="Height of the training pictures in pixels.")
    width: int = Field(default=512, ge=32, le=4096, description="Width of the training pictures in pixels.")
    channels: Literal[1, 3] = Field(default=1, description="Channels of the tensors: 1, or 3 equal ones.")
    dtype: Literal["float32", "float16"] = Field(
        default="float32",
        description="Numbers of the tensors: float16 halves their memory; the model turns them into its own.",
    )
    patch_level: str | None = Field(
        default=None,
        coerce_numbers_to_str=True,
        description="Read patches of height × width pixels of this level ('full', '2048' ...) instead of whole "
        "pictures, at a random place in training with augmentation and from the middle otherwise.",
    )
    window: Literal["manifest", "percentile", "fixed"] = Field(
        default="manifest",
        description="'manifest' takes the file's VOI window or LUT (percentiles where there is none), 'percentile' the "
        "breast's percentiles always, 'fixed' the range below.",
    )
    fixed_low: float = Field(default=0.0, description="Lower end of the fixed window, in stored values.")
    fixed_high: float = Field(default=4095.0, description="Upper end of the fixed window, in stored values.")
    clahe: ClaheSettings = Field(default_factory=ClaheSettings, description="Local contrast.")
    orient: bool = Field(default=True, description="Mirror right breasts, so that every chest wall is on the left.")
    mean: float = Field(default=0.5, description="Subtracted after scaling to [0, 1].")
    std: float = Field(default=0.25, gt=0, description="Divided by after that.")
    augment: AugmentSettings = Field(default_factory=AugmentSettings, description="Random changes in training.")

    @model_validator(mode="after")
    def _range(self) -> PipelineSettings:
        if self.fixed_high <= self.fixed_low:
            raise ValueError(f"fixed_high ({self.fixed_high}) must be above fixed_low ({self.fixed_low})")
        return self


class LoaderSettings(_Settings):
    """How samples are drawn and delivered. None of it changes how a picture looks, but for the rounding of a device."""

    batch_size: int = Field(default=8, ge=1, le=4096, description="Training samples a step and rank.")
    val_batch_size: int = Field(default=32, ge=1, le=4096, description="Validation and prediction samples a step.")
    sampling: Literal["natural", "balanced", "weighted"] = Field(
        default="balanced", description="How training samples are drawn."
    )
    positive_share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of positive samples in a balanced epoch, 1/8 for one in every eight; ignored by others.",
    )
    replacement: bool = Field(
        default=False,
        description="Draw each training sample anew, so that some come twice; weighted sampling always does.",
    )
    weight_column: str | None = Field(
        default=None,
        description="Column of the source CSV with each image's weight, for sampling = 'weighted'; without it the two "
        "classes are as likely as each other.",
    )
    hard_negatives: str | None = Field(
        default=None,
        description="CSV file whose image_id column lists negatives to show more often in a balanced epoch.",
    )
    hard_negative_share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of a balanced epoch's negatives that comes from that list, where one is given.",
    )
    epoch_samples: int | None = Field(
        default=None, ge=1, description="Samples an epoch; without it as many as there are images."
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Threads that prepare samples, and DALI's; 0 takes every core, under torchrun a process's share.",
    )
    prefetch: int = Field(
        default=2, ge=1, le=16, description="Batches prepared ahead, and as many again whose samples are."
    )
    steps_on: Literal["auto", "cpu"] = Field(
        default="auto",
        description="Where levels are decoded and go through the steps: 'auto' is the device that takes the batches; "
        "'cpu' leaves a GPU to the model, for one that is busy with it beside cores that are not.",
    )
    cache: Literal["none", "host", "device"] = Field(default="none", description="Where decoded levels are kept.")
    cache_mb: int = Field(default=2048, ge=1, description="Size of that cache in MiB.")
    max_bad_samples: int = Field(
        default=10, ge=0, description="Damaged tiles after which a run stops, with their list."
    )

    @model_validator(mode="after")
    def _is_used(self) -> LoaderSettings:
        for name, needed in (("weight_column", "weighted"), ("hard_negatives", "balanced")):
            if getattr(self, name) is not None and self.sampling != needed:
                raise ValueError(f"{name} needs sampling = '{needed}', and it is '{self.sampling}'")
        if self.cache == "device" and self.steps_on == "cpu":
            raise ValueError("cache = 'device' is for steps on the GPU; with steps_on = 'cpu' take cache = 'host'")
        return self
