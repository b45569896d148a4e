"""What conversion can be told."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Codec = Literal["zstd", "deflate", "lzw", "none", "htj2k"]
DecodeOn = Literal["cpu", "gpu", "gpu-all"]
FULL = "full"
GPU_CODEC: Codec = "htj2k"  # the best to train from on a GPU; docs/loading.md has the measurements
# Settings that change what a model sees, and those that change no byte of a store; others change how tiles are kept.
DECISIVE = ("levels", "crop", "crop_margin", "frame")
FREE = ("decode_on", "timeout_s", "memory_mb", "max_pixels")


class ConvertSettings(BaseModel):
    """How source pictures become a store. A store remembers them: the same settings give the same bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    levels: tuple[str, ...] = Field(
        default=("full", "2048", "1024", "512"),
        description="Levels to write, each named by its longest side in pixels; 'full' is the source's own resolution.",
    )
    codec: Codec = Field(
        default="zstd",
        description="Compression of the tiles: zstd is the best on a CPU, htj2k on a GPU.",
    )
    tile: int = Field(default=256, ge=16, le=4096, multiple_of=16, description="Side of a TIFF tile in pixels.")
    crop: bool = Field(default=True, description="Cut the picture to the breast; off keeps the whole picture.")
    crop_margin: float = Field(
        default=0.01, ge=0, le=0.2, description="Margin around the breast, as a share of the longest side."
    )
    frame: int | None = Field(
        default=None, ge=0, description="Frame to take out of multi-frame files; without it they are rejected."
    )
    decode_on: DecodeOn = Field(
        default="cpu",
        description="Where codestreams are decoded: 'gpu' takes JPEG 2000 and HTJ2K, 'gpu-all' lossless JPEG too. What "
        "a GPU cannot do, the CPU does; the values are the same.",
    )
    timeout_s: float = Field(
        default=120.0, gt=0, description="Seconds after which the decoding of one file is given up."
    )
    memory_mb: int = Field(
        default=4096, ge=512, description="MiB of address space a worker may use beyond what it starts with."
    )
    max_pixels: int = Field(default=120_000_000, ge=1, description="Pictures with more pixels than this are rejected.")

    @field_validator("levels", mode="before")
    @classmethod
    def _listed(cls, levels: Any) -> Any:
        """As the command line and YAML may have them: 'full,512', 512, [full, 512]."""
        listed = str(levels).split(",") if isinstance(levels, str | int) else levels
        return tuple(map(str, listed)) if isinstance(listed, list | tuple) else listed

    @field_validator("levels")
    @classmethod
    def _known_levels(cls, levels: tuple[str, ...]) -> tuple[str, ...]:
        sizes = [level for level in levels if level != FULL]
        if (
            not levels
            or len(set(levels)) != len(levels)
            or not all(re.fullmatch("[1-9][0-9]{1,4}", s) and 16 <= int(s) <= 65536 for s in sizes)
        ):
            raise ValueError(f"levels are 'full' and whole numbers from 16 to 65536, each once; found {list(levels)}")
        return tuple([FULL] * (FULL in levels) + sorted(sizes, key=int, reverse=True))

    def difference(self, other: ConvertSettings) -> tuple[str, str, str] | None:
        """The first of the settings that change what a model sees in which the two differ: its name, and the values
        here and there. None where pictures of both may be mixed."""
        for name in DECISIVE:
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                return name, as_text(here), as_text(there)
        return None


def as_text(value: Any) -> str:
    """A setting's value, as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
