"""A norm over another axis than the last one is no norm over the last one."""

import copy

import pytest
import torch
from torch import nn

import flashnorm
from flashnorm.verification.bounds import Size, output_bound
from tests.errors import relative


class Pixel(nn.Module):
    """RMS over the channels of an image, as decoders of images and sound have it."""

    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + 1e-6)


class ChannelsFirst(nn.Module):
    """LayerNorm over the channels of an image, with gain and bias."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(channels))
        self.bias = nn.Parameter(0.3 * torch.randn(channels))

    def forward(self, x):
        centered = x - x.mean(1, keepdim=True)
        normal = centered / torch.sqrt(centered.pow(2).mean(1, keepdim=True) + 1e-6)
        shape = (-1, *[1] * (x.ndim - 2))
        return self.weight.view(shape) * normal + self.bias.view(shape)


class Steps(Pixel):
    """RMS over the positions of a sequence."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6)


# As many channels as the last axis is long, and not.
SHAPES = [(2, 16, 5, 16), (2, 16, 16), (2, 16, 5, 8), (2, 16, 12)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [Pixel, ChannelsFirst, Steps])
def test_field_accelerated_norms_keep_their_axis(norm, shape):
    torch.manual_seed(0)
    model, x = nn.Sequential(norm(16)).eval(), torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
        flashnorm.accelerate_(model, x)
        found = [model(x), model(x)]
    bound = output_bound(Size(max(shape), 1, torch.float32), torch.float32)
    assert max(relative(each, expected) for each in found) <= bound


@pytest.mark.parametrize("shape", SHAPES[:3:2], ids=str)
def test_field_folded_norms_of_channels_are_exact(shape):
    torch.manual_seed(0)
    model = nn.Sequential(ChannelsFirst(16), nn.Conv2d(16, 4, 1)).eval().double()
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        flashnorm.fold_(model, x)
        assert relative(model(x), expected) <= 1e-12
