"""What predict_speed.py compares with: a script of a few lines, from DICOM files to a submission with pydicom, OpenCV
and one timm model, and the same with torch's DataLoader decoding on every core.

No guard, no checks, no fallback; windowed by the file's own window, cropped by Otsu's threshold, CLAHE, fitted into
a square.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pydicom
import torch
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_voi_lut
from torch.utils.data import DataLoader, Dataset

BATCH = 4  # a DataLoader hands a whole batch to one worker: large ones would leave the others idle on a short list


def read(path: Path, side: int) -> NDArray[np.float32]:
    """A file as the model's input, float32 [1, side, side]."""
    dataset = pydicom.dcmread(path)
    grey: Any = apply_voi_lut(dataset.pixel_array, dataset).astype(np.float32) / (2**dataset.BitsStored - 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 1 - grey
    picture = (np.clip(grey, 0, 1) * 255).astype(np.uint8)
    _, mask = cv2.threshold(picture, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    contours = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[-2]
    left, top, width, height = cv2.boundingRect(max(contours, key=cv2.contourArea))
    scale = side / max(width, height)
    size = round(width * scale), round(height * scale)
    small = cv2.resize(picture[top : top + height, left : left + width], size, interpolation=cv2.INTER_AREA)
    small = cv2.createCLAHE(2.0, (8, 8)).apply(small)
    padded = np.zeros((1, side, side), np.float32)
    padded[0, : small.shape[0], : small.shape[1]] = small / np.float32(255)
    return (padded - np.float32(0.5)) / np.float32(0.25)


class Pictures(Dataset[torch.Tensor]):
    """Files as tensors, float32 [1, side, side]."""

    def __init__(self, files: list[Path], side: int) -> None:
        self.files, self.side = files, side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(read(self.files[index], self.side))


@torch.inference_mode()
def predict(model: torch.nn.Module, images: Path, table: Path, side: int, out: Path, device: str, workers: int) -> None:
    """Write `prediction_id,cancer`, the mean of each breast's pictures.

    Args:
        model: [B, 1, side, side] to logits [B, 1].
        images: the folder that holds <patient_id>/<image_id>.dcm.
        table: their CSV.
        side: of the model's input.
        out: the submission.
        device: of torch.
        workers: of the DataLoader; 0 decodes in this process, a file at a time.
    """
    listed = pd.read_csv(table, dtype=str)
    files = [images / patient / f"{image}.dcm" for patient, image in listed[["patient_id", "image_id"]].to_numpy()]
    found = []
    batches = DataLoader(Pictures(files, side), batch_size=BATCH, num_workers=workers, worker_init_fn=_one_thread)
    for batch in batches:
        with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
            logits = model(batch.to(device).contiguous(memory_format=torch.channels_last))
        found.append(torch.sigmoid(logits[:, 0].float()).cpu().numpy())
    listed["cancer"] = np.concatenate(found)
    listed.groupby("prediction_id")["cancer"].mean().reset_index().to_csv(out, index=False)


def _one_thread(_worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
