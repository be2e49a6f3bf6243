"""Networks on images that Transformers does not have, in the structure of their papers.

Layers, strides, group counts and joins are as published; widths are divided by 4 to 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor


def conv(
    width: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Convolution, batch norm and, with ``act``, ReLU."""
    inner = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(inner, nn.BatchNorm2d(out), *[nn.ReLU()] * act)


class Classifier(nn.Module):
    """A body, its average over space, ten classes."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(self.body(pixel_values), 1)
        return self.head(torch.flatten(y, 1))


# -- ResNeXt-50 (arXiv 1611.05431, table 1) ---------------------------------------------------------------


class Bottleneck(nn.Module):
    """1x1, 3x3 in groups, 1x1, and the shortcut."""

    def __init__(self, width: int, inner: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.a, self.b = conv(width, inner), conv(inner, inner, 3, stride, groups)
        self.c = conv(inner, out, act=False)
        same = stride == 1 and width == out
        self.shortcut = nn.Identity() if same else conv(width, out, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.c(self.b(self.a(x))))


def resnext50(cut: int = 8, groups: int = 8) -> nn.Module:
    """Four stages of 3, 4, 6 and 3 blocks, each of ``groups`` groups (32 in the paper)."""
    width = 64 // cut
    body: list[nn.Module] = [conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, depth in enumerate((3, 4, 6, 3)):
        inner, out = 128 * 2**stage // cut, 256 * 2**stage // cut
        for block in range(depth):
            stride = 2 if stage and not block else 1
            body.append(Bottleneck(width, inner, out, stride, groups))
            width = out
    return Classifier(nn.Sequential(*body), width)


# -- DenseNet-121 (arXiv 1608.06993, table 1) -------------------------------------------------------------


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1, norm, ReLU, 3x3, over all outputs before it."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, found: Sequence[Tensor]) -> Tensor:
        y = self.conv1(F.relu(self.norm1(torch.cat(list(found), 1))))
        return self.conv2(F.relu(self.norm2(y)))


class DenseBlock(nn.Module):
    """Layers of which each sees the outputs of all."""

    def __init__(self, width: int, growth: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(width + at * growth, growth) for at in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(found))
        return torch.cat(found, 1)


def densenet121(growth: int = 4) -> nn.Module:
    """Blocks of 6, 12, 24 and 16 layers, with transitions that halve the width."""
    width = 2 * growth
    body: list[nn.Module] = [conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for block, depth in enumerate((6, 12, 24, 16)):
        body.append(DenseBlock(width, growth, depth))
        width += depth * growth
        body += [nn.BatchNorm2d(width), nn.ReLU()]
        if block < 3:
            body += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return Classifier(nn.Sequential(*body), width)


# -- GoogLeNet (arXiv 1409.4842, table 1; with batch norms, as libraries have it) -------------------------


class Inception(nn.Module):
    """Branches of 1x1, 3x3, 5x5 and pooled 1x1, put together."""

    def __init__(self, width: int, one: int, three: Sequence[int], five: Sequence[int], pool: int):
        super().__init__()
        self.branch1 = conv(width, one)
        self.branch2 = nn.Sequential(conv(width, three[0]), conv(three[0], three[1], 3))
        self.branch3 = nn.Sequential(conv(width, five[0]), conv(five[0], five[1], 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(width, pool))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


_INCEPTION = {  # module: 1x1, (3x3 reduce, 3x3), (5x5 reduce, 5x5), pool
    "3a": (64, (96, 128), (16, 32), 32),
    "3b": (128, (128, 192), (32, 96), 64),
    "4a": (192, (96, 208), (16, 48), 64),
    "4b": (160, (112, 224), (24, 64), 64),
    "4c": (128, (128, 256), (24, 64), 64),
    "4d": (112, (144, 288), (32, 64), 64),
    "4e": (256, (160, 320), (32, 128), 128),
    "5a": (256, (160, 320), (32, 128), 128),
    "5b": (384, (192, 384), (48, 128), 128),
}


def googlenet(cut: int = 8) -> nn.Module:
    """Nine inception modules."""
    width = 192 // cut
    body: list[nn.Module] = [
        conv(3, 64 // cut, 7, 2),
        nn.MaxPool2d(3, 2, 1),
        conv(64 // cut, 64 // cut),
        conv(64 // cut, width, 3),
        nn.MaxPool2d(3, 2, 1),
    ]
    for name, (one, three, five, pool) in _INCEPTION.items():
        if name in ("4a", "5a"):
            body.append(nn.MaxPool2d(3, 2, 1))
        three, five = [w // cut for w in three], [w // cut for w in five]
        body.append(Inception(width, one // cut, three, five, pool // cut))
        width = one // cut + three[1] + five[1] + pool // cut
    return Classifier(nn.Sequential(*body), width)


# -- ShuffleNetV2 (arXiv 1807.11164, figure 3 and table 5) and V1 (arXiv 1707.01083, figure 2) ------------


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels (g c) as (c g)."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class ShuffleUnit(nn.Module):
    """V2: half goes on, half is convolved; at stride 2 all goes both ways."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        half = out // 2
        inner = width if stride == 2 else half
        self.stride = stride
        self.shortcut = nn.Sequential(conv(width, width, 3, 2, width, act=False), conv(width, half))
        self.branch = nn.Sequential(
            conv(inner, half), conv(half, half, 3, stride, half, act=False), conv(half, half)
        )
        if stride == 1:
            del self.shortcut

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            keep, other = x.chunk(2, 1)
            y = torch.cat([keep, self.branch(other)], 1)
        else:
            y = torch.cat([self.shortcut(x), self.branch(x)], 1)
        return channel_shuffle(y, 2)


def shufflenet_v2(widths: Sequence[int] = (28, 56, 112)) -> nn.Module:
    """Stages of 4, 8 and 4 units."""
    width = 8
    body: list[nn.Module] = [conv(3, width, 3, 2), nn.MaxPool2d(3, 2, 1)]
    for out, depth in zip(widths, (4, 8, 4), strict=True):
        for unit in range(depth):
            body.append(ShuffleUnit(width, out, 1 if unit else 2))
            width = out
    return Classifier(nn.Sequential(*body, conv(width, 128)), 128)


class GroupedUnit(nn.Module):
    """V1: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; at stride 2 beside the pooled input."""

    def __init__(self, width: int, out: int, stride: int, groups: int, first: bool) -> None:
        super().__init__()
        inner = out // 4
        self.stride, self.groups = stride, groups
        made = out - width if stride == 2 else out
        self.a = conv(width, inner, groups=1 if first else groups)  # the stem is narrow
        self.b = conv(inner, inner, 3, stride, inner, act=False)
        self.c = conv(inner, made, groups=groups, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(channel_shuffle(self.a(x), self.groups)))
        if self.stride == 2:
            return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1))
        return F.relu(x + y)


def shufflenet_v1(groups: int = 2, widths: Sequence[int] = (48, 96, 192)) -> nn.Module:
    """Stages of 4, 8 and 4 units."""
    width = 8
    body: list[nn.Module] = [conv(3, width, 3, 2), nn.MaxPool2d(3, 2, 1)]
    for out, depth in zip(widths, (4, 8, 4), strict=True):
        for unit in range(depth):
            body.append(GroupedUnit(width, out, 1 if unit else 2, groups, first=len(body) == 2))
            width = out
    return Classifier(nn.Sequential(*body), width)


# -- U-Net (arXiv 1505.04597, figure 1) -------------------------------------------------------------------


class UNet(nn.Module):
    """Four levels down, four up; what comes across is cropped and put in front."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(5)]

        def double(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(conv(before, after, 3), conv(after, after, 3))

        ups = widths[::-1]
        self.down = nn.ModuleList(map(double, [3, *widths[:-1]], widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairwise(ups))
        self.join = nn.ModuleList(double(2 * after, after) for after in ups[1:])
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        across = []
        x = pixel_values
        for level, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if level else x)
            across.append(x)
        for up, join, kept in zip(self.up, self.join, across[-2::-1], strict=True):
            x = up(x)
            edge = 1 if x.shape[2] > 8 else 0
            size = x.shape[2] - edge
            x = join(
                torch.cat([kept[:, :, edge:size, edge:size], x[:, :, edge:size, edge:size]], 1)
            )
            x = F.pad(x, (edge,) * 4)
        return self.out(x)


# -- super-resolution with pixel shuffle (EDSR, arXiv 1707.02921, figure 3; ESPCN, arXiv 1609.05158) ------


class ResidualBlock(nn.Module):
    """Convolution, ReLU, convolution, without norms; the branch enters with a tenth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.b(F.relu(self.a(x)))


class SuperResolution(nn.Module):
    """Sixteen residual blocks, a skip around them, and twice the pixels twice."""

    def __init__(self, width: int = 12, depth: int = 16) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(depth)))
        self.tail = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
                for _ in range(2)
            )
        )
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.head(pixel_values)
        return self.out(self.up(x + self.tail(self.body(x))))


# -- YOLOv8-style backbone and neck: C2f, SPPF, PAN -------------------------------------------------------


class Csp(nn.Module):
    """C2f: one half goes through bottlenecks, and all their outputs are put together."""

    def __init__(self, width: int, out: int, depth: int, add: bool) -> None:
        super().__init__()
        inner = out // 2
        self.split, self.join = conv(width, 2 * inner), conv((2 + depth) * inner, out)
        self.stages = nn.ModuleList(
            nn.Sequential(conv(inner, inner, 3), conv(inner, inner, 3)) for _ in range(depth)
        )
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        found = list(self.split(x).chunk(2, 1))
        for stage in self.stages:
            y = stage(found[-1])
            found.append(found[-1] + y if self.add else y)
        return self.join(torch.cat(found, 1))


class PyramidPool(nn.Module):
    """SPPF: an input and three pools of it, each of the one before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = conv(width, width // 2), conv(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.a(x)]
        for _ in range(3):
            found.append(F.max_pool2d(found[-1], 5, 1, 2))
        return self.b(torch.cat(found, 1))


class Yolo(nn.Module):
    """Three levels, up and down again, with a head on each."""

    def __init__(self, widths: Sequence[int] = (8, 16, 32, 64, 64)) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.stem = nn.Sequential(conv(3, a, 3, 2), conv(a, b, 3, 2), Csp(b, b, 1, True))
        self.p3 = nn.Sequential(conv(b, c, 3, 2), Csp(c, c, 2, True))
        self.p4 = nn.Sequential(conv(c, d, 3, 2), Csp(d, d, 2, True))
        self.p5 = nn.Sequential(conv(d, e, 3, 2), Csp(e, e, 1, True), PyramidPool(e))
        self.up4, self.up3 = Csp(d + e, d, 1, False), Csp(c + d, c, 1, False)
        self.down3, self.down4 = conv(c, c, 3, 2), conv(d, d, 3, 2)
        self.out4, self.out5 = Csp(c + d, d, 1, False), Csp(d + e, e, 1, False)
        self.heads = nn.ModuleList(
            nn.Sequential(conv(width, 16, 3), nn.Conv2d(16, 6, 1)) for width in (c, d, e)
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        p3 = self.p3(self.stem(pixel_values))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        p4 = self.up4(torch.cat([F.interpolate(p5, scale_factor=2.0), p4], 1))
        p3 = self.up3(torch.cat([F.interpolate(p4, scale_factor=2.0), p3], 1))
        p4 = self.out4(torch.cat([self.down3(p3), p4], 1))
        p5 = self.out5(torch.cat([self.down4(p4), p5], 1))
        return tuple(head(x) for head, x in zip(self.heads, (p3, p4, p5), strict=True))
