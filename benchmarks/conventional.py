"""The conventional stack: torch's DataLoader on every core, pydicom, OpenCV and albumentations, with this project's own
steps, strengths and probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np
import pydicom
import torch
from loader_set import SIDE, windowed
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_voi_lut
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from dali_pipes.settings import AugmentSettings, PipelineSettings

Form = Literal["dicom", "png8", "npy16"]


def transforms(settings: AugmentSettings) -> A.Compose:
    """`AugmentSettings` in albumentations."""
    turn, shift, scale = settings.rotate_deg, settings.shift, settings.scale
    hole = (settings.dropout_size / 4, settings.dropout_size)
    return A.Compose(
        [
            A.HorizontalFlip(p=settings.hflip),
            A.VerticalFlip(p=settings.vflip),
            A.Affine(
                rotate=(-turn, turn),
                translate_percent=(-shift, shift),
                scale=(1 - scale, 1 + scale),
                p=settings.affine,
            ),
            A.GridDistortion(num_steps=settings.grid_steps, distort_limit=settings.grid_limit, p=settings.grid),
            A.RandomBrightnessContrast(settings.brightness, settings.contrast, p=settings.tone),
            A.RandomGamma((round(100 * (1 - settings.gamma)), round(100 * (1 + settings.gamma))), p=settings.tone),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, settings.blur_sigma), p=settings.blur),
            A.Sharpen(p=settings.sharpen),
            A.GaussNoise(std_range=(0, settings.noise_sigma), p=settings.noise),
            A.CoarseDropout((1, settings.dropout_holes), hole, hole, p=settings.dropout),
        ]
    )


class Pictures(Dataset[torch.Tensor]):
    """Training pictures of 512 by 512, float32 [1, H, W], from files of one form."""

    def __init__(self, files: list[Path], form: Form, pipeline: PipelineSettings) -> None:
        self.files, self.form, self.pipeline = files, form, pipeline
        self.transform = transforms(pipeline.augment)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        picture = self.read(self.files[index % len(self.files)])
        clahe = self.pipeline.clahe
        if clahe.enabled:
            picture = cv2.createCLAHE(clahe.clip_limit, (clahe.grid, clahe.grid)).apply(picture)
        padded = np.zeros((SIDE, SIDE), np.uint8)
        top, left = (SIDE - picture.shape[0]) // 2, (SIDE - picture.shape[1]) // 2
        padded[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        changed = self.transform(image=padded)["image"]
        scaled = (changed.astype(np.float32) / 255 - self.pipeline.mean) / self.pipeline.std
        return torch.from_numpy(scaled)[None]

    def read(self, path: Path) -> NDArray[np.uint8]:
        """A file as a windowed picture of longest side 512, uint8."""
        if self.form == "png8":
            return np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), np.uint8)
        if self.form == "npy16":
            return windowed(np.load(path))
        dataset = pydicom.dcmread(path)
        shown: Any = apply_voi_lut(dataset.pixel_array, dataset)
        scale = SIDE / max(shown.shape)
        size = round(shown.shape[1] * scale), round(shown.shape[0] * scale)
        small = cv2.resize(shown.astype(np.float32), size, interpolation=cv2.INTER_AREA)
        return np.asarray(np.clip(small / (2**dataset.BitsStored - 1), 0, 1) * 255, np.uint8)


def batches(
    files: list[Path], form: Form, pipeline: PipelineSettings, batch_size: int, workers: int
) -> Iterator[torch.Tensor]:
    """Shuffled batches without end."""
    data = Pictures(files, form, pipeline)
    assert not isinstance(data, IterableDataset)
    sampler = RandomSampler(data, replacement=True, num_samples=10**9)
    loader = DataLoader(data, batch_size, sampler=sampler, num_workers=workers, worker_init_fn=_one_thread)
    return iter(loader)


def _one_thread(_worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
