"""Models that leave the project: ONNX and torch.export programs of a run, weights as safetensors, and one JSON with all
that it takes to use them.

`export` writes a folder:
    model.onnx            the run's folds in one graph: `image` float32 [batch, C, H, W] as the pipeline gives it, to
                          `probability` float32 [batch] in [0, 1], the mean of the folds; any batch
    model.pt2             the same as a `torch.export` program, for `torch.export.load`
    foldK.safetensors     each fold's weights, as training published them
    model.json            pipeline, conversion, aggregation, prior, threshold, hashes; written last, so that a folder
                          with one is whole
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from dali_pipes.settings import LoaderSettings, PipelineSettings
from preprocessing.errors import ConfigError, RunError, command_line
from preprocessing.files import scratch, write_atomically
from preprocessing.settings import ConvertSettings
from training import run_files, runs
from training.device import pick_device
from training.inference.assemble import Aggregate, open_ensemble
from training.inference.calibration import Calibration, Method
from training.inference.covariates import Covariates
from training.inference.ensemble import Ensemble, Group, Member

ONNX, PROGRAM, DESCRIPTION = "model.onnx", "model.pt2", "model.json"
FORMAT = "mammopipe-export"
VERSION = 1
# Probabilities of the exported model may leave torch's by this much; rounding of float32 is far below.
TOLERANCE = 1e-4
_BATCHES = (2, 1, 5)  # the first one is traced, all are compared


class Description(BaseModel):
    """What model.json must say for an exported model to be used; the rest of it is for people."""

    model_config = ConfigDict(extra="allow", frozen=True)

    sha256: dict[str, str]
    pipeline: PipelineSettings
    loader: LoaderSettings
    conversion: ConvertSettings
    aggregate: str = Field(pattern=r"^(mean|max|noisy_or|power:\d+(\.\d+)?)$")
    prior: float = Field(ge=0, le=1)
    threshold: float | None  # none where the breasts were of one class
    calibration: Calibration
    covariates: Covariates = Covariates()  # exports before 2026-11-26 had none


@dataclass(frozen=True)
class ExportSummary:
    """What was written; differences are the largest between probabilities of the exported model and torch's."""

    folder: Path
    folds: int
    onnx_difference: float
    program_difference: float

    def __str__(self) -> str:
        return (
            f"Exported {self.folds} fold(s) to {self.folder / ONNX} and {PROGRAM}; largest difference from torch "
            f"{self.onnx_difference:.1e} (onnxruntime) and {self.program_difference:.1e} (torch.export). "
            f"Predict with: {command_line(f'predict --model {self.folder / ONNX}')}"
        )


class FoldMean(nn.Module):
    """The folds of a run as one model: the mean of their probabilities."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities, float32 [B], of pictures [B, C, H, W]."""
        return torch.stack([torch.sigmoid(model(image)) for model in self.models]).mean(dim=0)


class OnnxModel:
    """An exported model behind the face of a torch one: pictures to logits, with onnxruntime."""

    def __init__(self, path: Path, device: torch.device) -> None:
        runtime = _onnxruntime()
        gpu = device.type == "cuda" and "CUDAExecutionProvider" in runtime.get_available_providers()
        providers: list[Any] = [("CUDAExecutionProvider", {"device_id": device.index or 0})] if gpu else []
        try:
            self._session = runtime.InferenceSession(str(path), providers=[*providers, "CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - its own kinds have no common base
            raise RunError(f"{path}: onnxruntime cannot load it ({' '.join(str(error).split())}).") from None

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of a picture."""
        return tuple(self._session.get_inputs()[0].shape[1:])

    def probabilities(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities, float32 [B], of pictures, float32 [B, C, H, W]."""
        return np.asarray(self._session.run(["probability"], {"image": image})[0])

    def __call__(self, image: Tensor) -> Tensor:
        """Logits, float32 [B], of pictures [B, C, H, W] on any device."""
        found = self.probabilities(image.float().contiguous().cpu().numpy())
        return torch.logit(torch.from_numpy(found)).to(image.device)


def export(
    folder: Path,
    out: Path,
    calibrate: Method = "none",
    aggregate: Aggregate = "run",
    covariates: Sequence[str] | None = None,
) -> ExportSummary:
    """Write a run, or one fold of it, as models for other programs. See the module's text for the files.

    Args:
        folder: `runs/NAME` or `runs/NAME/foldK`.
        out: folder for the files; those of an earlier export are replaced.
        calibrate: how breasts' probabilities are calibrated; kept in model.json, the graph itself stays as it is.
        aggregate: from pictures to a breast, as `open_ensemble` takes it; kept there, too.
        covariates: what a breast's probability takes from the table, as `open_ensemble` takes `names`; kept there, too.

    Raises:
        RunError: a run that is missing, unfinished or damaged, or an exported model that does not say what torch says.
        ConfigError: onnx, onnxscript or onnxruntime is not installed.
    """
    _onnxruntime()
    ensemble = open_ensemble([folder], "cpu", calibrate=calibrate, aggregate=aggregate, names=covariates)
    pipeline = ensemble.groups[0].pipeline
    if any(group.pipeline != pipeline for group in ensemble.groups):
        raise RunError(f"{folder}: its folds were trained with different pipelines; export each by itself.")
    members = [member for group in ensemble.groups for member in group.members]
    model = FoldMean([cast(nn.Module, member.model) for member in members]).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (pipeline.channels, pipeline.height, pipeline.width)
    pictures = [torch.randn(batch, *shape, generator=generator) for batch in _BATCHES]
    with torch.inference_mode():
        wanted = [model(picture).numpy() for picture in pictures]
    with scratch("mammopipe-export-") as traced:
        onnx_path, program_path = _trace(model, pictures[0], traced)
        session, program = OnnxModel(onnx_path, torch.device("cpu")), torch.export.load(program_path).module()
        with torch.inference_mode():
            by_onnx = [session.probabilities(picture.numpy()) for picture in pictures]
            by_program = [program(picture).numpy() for picture in pictures]
        summary = ExportSummary(out, len(members), _difference(by_onnx, wanted), _difference(by_program, wanted))
        for name, worst in ((ONNX, summary.onnx_difference), (PROGRAM, summary.program_difference)):
            if not worst <= TOLERANCE:
                raise RunError(
                    f"{folder}: as {name} its probabilities differ from torch's by up to {worst:.2g}, more than "
                    f"{TOLERANCE}; nothing was written. Report the backbone and the versions that doctor shows."
                )
        folds = runs.folds_of(folder)
        contents = {ONNX: onnx_path.read_bytes(), PROGRAM: program_path.read_bytes()}
        contents |= {f"fold{fold.fold}.safetensors": fold.best.read_bytes() for fold in folds}
    out.mkdir(parents=True, exist_ok=True)
    (out / DESCRIPTION).unlink(missing_ok=True)
    for name, content in contents.items():
        write_atomically(out / name, content)
    for earlier in set(out.glob("fold*.safetensors")) - {out / name for name in contents}:
        if re.fullmatch(r"fold\d+", earlier.stem):
            earlier.unlink()
    run_files.write_json(out / DESCRIPTION, _description(ensemble, folds, contents, summary))
    return summary


def open_exported(path: Path, device: str = "auto") -> Ensemble:
    """An exported model, ready to predict with onnxruntime.

    Args:
        path: `model.onnx`, with its `model.json` beside it, or their folder.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N': where the pipeline runs, and the model where onnxruntime can.

    Raises:
        RunError: a file is missing, damaged, or of another version.
        ConfigError: onnxruntime is not installed.
    """
    path = path / ONNX if path.is_dir() else path
    beside = path.with_name(DESCRIPTION)
    for file in (path, beside):
        if not file.is_file():
            raise RunError(
                f"{file}: no such file. Make it with: {command_line(f'export --runs RUN --out {path.parent}')}"
            )
    again = "Export the run again."
    known = run_files.read_json(beside, again)
    if known.get("format") != FORMAT or known.get("version") != VERSION:
        raise RunError(f"{beside}: not an export of this program's version {VERSION}. {again}")
    described = run_files.checked_json(Description, beside, known, again)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if described.sha256.get(path.name) != sha256:
        raise RunError(f"{path}: its SHA-256 is not the one in {beside.name}; it is damaged. {again}")
    place = pick_device(device)
    model, pipeline = OnnxModel(path, place), described.pipeline
    if model.shape != (pipeline.channels, pipeline.height, pipeline.width):
        raise RunError(f"{beside}: pipeline: not the size that {path.name} takes, {model.shape}. {again}")
    member = Member(0, sha256, model, torch.float32, channels_last=False)
    return Ensemble(
        names=(str(path),),
        groups=(Group(pipeline, described.loader, (member,)),),
        weights=np.ones(1),
        aggregates=(described.aggregate,),
        prior=described.prior,
        threshold=math.nan if described.threshold is None else described.threshold,
        settings=described.conversion,
        device=place,
        calibration=described.calibration,
        covariates=(described.covariates,),
    )


def _trace(model: FoldMean, picture: Tensor, folder: Path) -> tuple[Path, Path]:
    """The model as ONNX and as a program, for any batch."""
    batch = torch.export.Dim("batch", min=1, max=2**16)
    with warnings.catch_warnings():  # the exporters warn of their own deprecations
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        program = torch.export.export(model, (picture,), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / PROGRAM)
        torch.onnx.export(
            program,
            f=str(folder / ONNX),
            input_names=["image"],
            output_names=["probability"],
            external_data=False,
            verbose=False,
        )
    return folder / ONNX, folder / PROGRAM


def _description(
    ensemble: Ensemble, folds: Sequence[runs.FoldRun], contents: dict[str, bytes], summary: ExportSummary
) -> dict[str, Any]:
    group = ensemble.groups[0]
    pipeline = group.pipeline
    shape = [pipeline.channels, pipeline.height, pipeline.width]
    return {
        "format": FORMAT,
        "version": VERSION,
        "use": "research; not a medical device",
        "run": Path(ensemble.names[0]).name,
        "folds": [fold.fold for fold in folds],
        "backbone": folds[0].config.model.backbone,
        "input": {"name": "image", "dtype": "float32", "shape": ["batch", *shape]},
        "output": {"name": "probability", "dtype": "float32", "shape": ["batch"], "range": [0, 1]},
        "pipeline": pipeline.model_dump(mode="json"),
        "loader": group.loader.model_dump(mode="json"),
        "conversion": ensemble.settings.model_dump(mode="json"),
        "aggregate": ensemble.aggregates[0],
        "prior": ensemble.prior,
        "threshold": ensemble.threshold,
        "calibration": ensemble.calibration.model_dump(mode="json"),
        "covariates": ensemble.covariates[0].model_dump(mode="json"),
        "max_difference": {ONNX: summary.onnx_difference, PROGRAM: summary.program_difference},
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "timm", "onnx", "onnxruntime")},
    }


def _difference(found: Sequence[NDArray[np.float32]], wanted: Sequence[NDArray[np.float32]]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(found, wanted, strict=True))


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("ONNX models need extra packages; install them with: pip install -e '.[export]'") from None
    return onnxruntime
