"""The model: a timm backbone, attention pooling over its feature map, a head for cancer and optional auxiliary heads.

Shapes: B pictures, C input channels, H x W pixels; F features on a map of h x w cells.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import cast

import timm
import timm.layers
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from preprocessing.errors import ConfigError
from training.config import ModelSettings

# timm's norms over the channels of a map [B, F, h, w]; some came later than others.
_NORMS_OF_MAPS = tuple(
    getattr(timm.layers, name) for name in ("LayerNorm2d", "RmsNorm2d", "SimpleNorm2d") if hasattr(timm.layers, name)
)
# Classes of each auxiliary head; what a column's values mean is in losses.py.
AUX_CLASSES = {"density": 4, "BIRADS": 3, "invasive": 2, "view": 2}


def build_model(settings: ModelSettings, in_chans: int = 1) -> MammoModel:
    """The model with random weights; `weights.load_pretrained` fills the backbone.

    Raises:
        ConfigError: timm does not know the backbone, or it cannot do what the settings ask for.
    """
    if not timm.is_model(settings.backbone):
        known = timm.list_models()
        close = difflib.get_close_matches(settings.backbone.split(".")[0], known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists those there are."
        raise ConfigError(f"model.backbone = '{settings.backbone}': timm knows no such model; {hint}")
    try:
        backbone = timm.create_model(
            settings.backbone,
            pretrained=False,
            in_chans=in_chans,
            num_classes=0,
            global_pool="",
            drop_path_rate=settings.drop_path or None,  # timm passes on what is not None, and some take no such thing
        )
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"model.backbone = '{settings.backbone}': it cannot be built with {in_chans} input channel(s) and "
            f"drop_path {settings.drop_path} ({' '.join(str(error).split())}); "
            f"{'set model.drop_path=0' if 'drop_path' in str(error) else 'choose another backbone'}."
        ) from None
    _freeze(backbone, settings)
    if settings.gradient_checkpointing:
        try:
            cast(nn.Module, backbone).set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
        except (AssertionError, AttributeError):
            raise ConfigError(
                f"model.gradient_checkpointing: '{settings.backbone}' cannot do it; set it to false."
            ) from None
    return MammoModel(backbone, settings)


def _freeze(backbone: nn.Module, settings: ModelSettings) -> None:
    """Take the stem and the first stages out of training; their batch statistics still follow the pictures."""
    if not settings.freeze_stages:
        return
    try:
        matcher = backbone.group_matcher(coarse=True)  # pyright: ignore[reportCallIssue]
        stage_of = group_parameters(backbone, matcher, reverse=True)
    except (AssertionError, AttributeError):
        raise ConfigError(f"model.freeze_stages: '{settings.backbone}' has no stages to freeze; set it to 0.") from None
    stages = sorted(set(stage_of.values()))
    if settings.freeze_stages >= len(stages) - 1:
        raise ConfigError(
            f"model.freeze_stages = {settings.freeze_stages}: {settings.backbone} has {len(stages) - 1} stages after "
            "its stem; leave at least one to train."
        )
    for name, stage in stage_of.items():
        if stage <= stages[settings.freeze_stages]:
            backbone.get_parameter(name).requires_grad_(False)


def require_sizes(model: MammoModel, channels: int, sizes: Collection[tuple[int, int]]) -> None:
    """See that the model takes pictures of these sizes (height and width), by sending a black one of each through it,
    and leave parameters that no output depends on, parts of a head that is not used here, out of training:
    DistributedDataParallel would wait for their gradients. The model is left in evaluation mode.

    Raises:
        ConfigError: the backbone does not take a size.
    """
    model.eval()
    for size in (ordered := sorted(sizes, reverse=True)):
        picture = torch.zeros(1, channels, *size, device=model.head.weight.device)
        try:
            with torch.set_grad_enabled(size == ordered[-1]):
                outputs = model.outputs(picture)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            described = cast(dict, model.backbone.pretrained_cfg)
            _, height, width = described["input_size"]
            made = f"was made for {height} × {width}: set pipeline.height={height}, pipeline.width={width} and"
            way_out = "Take another backbone." if size == (height, width) else f"It {made} train.progressive=[]."
            raise ConfigError(
                f"model.backbone = '{described['architecture']}' does not take pictures of {size[0]} × {size[1]} "
                f"({' '.join(str(error).split())[:200]}). {way_out}"
            ) from None
    used = _leaves([outputs["cancer"], *(outputs[name] for name in model.aux)])
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in used)


def _leaves(outputs: Sequence[Tensor]) -> set[Tensor]:
    """The parameters that outputs depend on: those that autograd would give gradients to."""
    found, seen = set(), set()
    waiting = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            found.add(node.variable)  # pyright: ignore[reportAttributeAccessIssue]
    return found


class MammoModel(nn.Module):
    """Backbone, pooling and heads. `forward` gives cancer's logits alone; `outputs` everything."""

    def __init__(self, backbone: nn.Module, settings: ModelSettings) -> None:
        super().__init__()
        self.backbone = backbone
        features = int(cast(int, backbone.num_features))
        self.pool = POOLINGS[settings.pooling](features)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(features, 1)
        self.aux = nn.ModuleDict({name: nn.Linear(features, AUX_CLASSES[name]) for name in settings.aux})

    def forward(self, x: Tensor) -> Tensor:
        """Logits of cancer, float32 [B], of pictures [B, C, H, W]."""
        return self.outputs(x)["cancer"]

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """Everything the model has to say of pictures [B, C, H, W].

        Returns:
            `cancer`: logits, float32 [B]; `attention`: where the pooling looked, float32 [B, h, w], summing to 1 over
            each picture; `embedding`: float32 [B, F]; and each auxiliary head's logits under its name, [B, classes].
        """
        embedding, attention = self.pool(self.forward_features(x))
        kept = self.dropout(embedding)
        heads = {name: head(kept).float() for name, head in self.aux.items()}
        return {
            "cancer": self.head(kept).squeeze(1).float(),
            "attention": attention,
            "embedding": embedding.float(),
            **heads,
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """The backbone's last feature map, [B, F, h, w]; pictures may come in any floating-point type."""
        x = x.to(self.head.weight.dtype)
        features = cast(nn.Module, self.backbone).forward_features(x)  # pyright: ignore[reportCallIssue]
        return _head_norm(_as_map(features, self.backbone), self.backbone)


class EveryHead(nn.Module):
    """The model with `outputs` as its forward: what training calls, wraps in DistributedDataParallel and compiles."""

    def __init__(self, model: MammoModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """See `MammoModel.outputs`."""
        return self.model.outputs(x)


class AttentionPool(nn.Module):
    """Gated attention over the cells of a feature map (Ilse et al. 2018, equation 9).

    It starts as the plain average: the last layer's weights are 0, so that pretrained features come through at first.
    """

    def __init__(self, features: int, hidden: int = 128) -> None:
        super().__init__()
        self.value = nn.Conv2d(features, hidden, 1)
        self.gate = nn.Conv2d(features, hidden, 1)
        self.score = nn.Conv2d(hidden, 1, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map [B, F, h, w] to the pooled vector [B, F] and the attention [B, h, w], which sums to 1 a picture."""
        score = self.score(torch.tanh(self.value(features)) * torch.sigmoid(self.gate(features)))
        attention = score.float().flatten(1).softmax(dim=1).view_as(score)  # softmax wants float32
        pooled = (features * attention.to(features.dtype)).sum(dim=(2, 3))
        return pooled, attention.squeeze(1)


class AveragePool(nn.Module):
    """Plain average; its map is each cell's activation strength."""

    def __init__(self, features: int) -> None:
        super().__init__()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map [B, F, h, w] to the mean [B, F] and a map [B, h, w] that sums to 1 a picture."""
        return features.mean(dim=(2, 3)), _strength(features)


class GeMPool(nn.Module):
    """Generalised mean, its exponent learnt (Radenović et al. 2018, equation 2): 1 averages, infinity peaks."""

    def __init__(self, features: int, exponent: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor(exponent))
        self.eps = eps

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map [B, F, h, w] to the generalised mean [B, F] and a map [B, h, w] that sums to 1 a picture."""
        powered = features.float().clamp(min=self.eps) ** self.exponent  # float32: x^3 leaves fp16's range
        return powered.mean(dim=(2, 3)) ** (1 / self.exponent), _strength(powered)


POOLINGS: dict[str, type[AttentionPool] | type[AveragePool] | type[GeMPool]] = {
    "attention": AttentionPool,
    "avg": AveragePool,
    "gem": GeMPool,
}


def _head_norm(features: Tensor, backbone: nn.Module) -> Tensor:
    """The map [B, F, h, w] through the last normalisation of ConvNeXt and its kin, and of some transformers, which keep
    it in the head, or as what follows the pooling; neither is otherwise used here."""
    for norm in (getattr(getattr(backbone, "head", None), "norm", None), getattr(backbone, "fc_norm", None)):
        if isinstance(norm, _NORMS_OF_MAPS):
            return cast(nn.Module, norm)(features)
        if isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (features.shape[1],):
            return norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return features


def _strength(features: Tensor) -> Tensor:
    strength = features.float().abs().mean(dim=1)
    return strength / strength.sum(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def _as_map(features: Tensor, backbone: nn.Module) -> Tensor:
    """The backbone's features as [B, F, h, w], whether it is convolutional, hierarchical (channels last) or tokens."""
    count = backbone.num_features
    if not isinstance(features, Tensor):
        raise ConfigError("model.backbone: it gives several maps of features at once; choose one with a single map.")
    if features.ndim == 4 and features.shape[1] == count:
        return features
    if features.ndim == 4 and features.shape[-1] == count:
        return features.permute(0, 3, 1, 2)
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if features.ndim == 3 and features.shape[-1] == count and grid is not None:
        prefix = int(getattr(backbone, "num_prefix_tokens", 0))
        tokens = features[:, prefix:]
        return tokens.transpose(1, 2).unflatten(2, (int(grid[0]), int(grid[1])))
    raise ConfigError(
        f"model.backbone: its features have shape {tuple(features.shape)}, expected a map of {count} channels, or "
        "tokens on a known grid; choose a backbone with a feature map."
    )
