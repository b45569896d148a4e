from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from training.inference.batch_norm import fold_batch_norms


def randomised(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize("name", ["test_efficientnet", "tf_efficientnet_lite0", "resnet18", "test_convnext"])
def test_folded_models_say_the_same(name):
    model = randomised(timm.create_model(name, in_chans=1, num_classes=0, pretrained=False))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    folded = copy.deepcopy(model)
    assert fold_batch_norms(folded) == norms
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    picture = torch.randn(2, 1, 96, 64)
    with torch.inference_mode():
        wanted, found = model.forward_features(picture), folded.forward_features(picture)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


class Shared(nn.Module):
    """A convolution that is read twice, one that is used twice, and a normalisation after none."""

    def __init__(self):
        super().__init__()
        self.twice_read, self.twice_used = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x):
        read = self.twice_read(x)
        read = self.norms[0](read) + read
        used = self.norms[2](self.twice_used(self.norms[1](self.twice_used(read))))
        return self.norms[3](used + 1)


def test_what_is_shared_is_left():
    model = randomised(Shared())
    assert fold_batch_norms(model) == 0


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.convolution(x if x.mean() > 0 else -x))


def test_a_model_that_cannot_be_traced_is_left():
    model = randomised(Branching())
    assert fold_batch_norms(model) == 0
    assert isinstance(model.norm, nn.BatchNorm2d)
