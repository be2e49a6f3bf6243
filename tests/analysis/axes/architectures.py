"""Networks that the zoo lacks, small: those at whose joins other tools break.

Concatenation (DenseNet, GoogLeNet, U-Net with a crop, a YOLO neck), split and channel shuffle
(ShuffleNetV2), grouped convolution (ResNeXt, RegNet), pixel shuffle, and experts that share one beside
those a router picks (Qwen2-MoE).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor


def conv(width: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    inner = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(inner, nn.BatchNorm2d(out), nn.ReLU())


class Classifier(nn.Module):
    """A body, its average over space, ten classes."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Excite(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(y))))


class Bottleneck(nn.Module):
    """ResNeXt's, and with ``excite`` RegNet's."""

    def __init__(self, width: int, inner: int, groups: int, excite: bool = False) -> None:
        super().__init__()
        self.a, self.b = conv(width, inner), conv(inner, inner, 3, groups=groups)
        self.excite = Excite(inner, 3) if excite else nn.Identity()
        self.c = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.c(self.excite(self.b(self.a(x)))))


def resnext() -> nn.Module:
    """Two bottlenecks of eight groups."""
    return Classifier(nn.Sequential(conv(3, 12, 3), *(Bottleneck(12, 16, 8) for _ in range(2))), 12)


def regnet() -> nn.Module:
    """Two bottlenecks of three groups, with squeeze and excite."""
    blocks = (Bottleneck(12, 12, 3, excite=True) for _ in range(2))
    return Classifier(nn.Sequential(conv(3, 12, 3), *blocks), 12)


class Dense(nn.Module):
    """A layer of DenseNet: its output behind its input."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.a, self.b = conv(width, 8), nn.Conv2d(8, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.b(self.a(F.relu(self.norm(x))))], 1)


def densenet() -> nn.Module:
    """Two stages with a transition between them."""
    body = [conv(3, 6, 3), Dense(6, 4), Dense(10, 4), Dense(14, 4), conv(18, 9), nn.AvgPool2d(2)]
    return Classifier(nn.Sequential(*body, Dense(9, 4), Dense(13, 4)), 17)


class Inception(nn.Module):
    """Four branches put together."""

    def __init__(self, width: int, a: int, b: int, c: int, d: int) -> None:
        super().__init__()
        self.a, self.b = conv(width, a), nn.Sequential(conv(width, 4), conv(4, b, 3))
        self.c = nn.Sequential(conv(width, 3), conv(3, c, 3), conv(c, c, 3))
        self.d = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(width, d))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)


def googlenet() -> nn.Module:
    """Two inception modules."""
    body = nn.Sequential(conv(3, 8, 3), Inception(8, 4, 6, 3, 3), Inception(16, 5, 4, 4, 2))
    return Classifier(body, 15)


class Unit(nn.Module):
    """ShuffleNetV2's: split, convolve one half, concatenate, shuffle."""

    def __init__(self, half: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.branch = nn.Sequential(
            conv(half, half), depthwise, nn.BatchNorm2d(half), conv(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        keep, other = x.chunk(2, 1)
        y = torch.cat([keep, self.branch(other)], 1)
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def shufflenet() -> nn.Module:
    """Three units: each shuffles what the one before shuffled."""
    return Classifier(nn.Sequential(conv(3, 12, 3), Unit(6), Unit(6), Unit(6), conv(12, 16)), 16)


class UNet(nn.Module):
    """Down, up, and the way across cropped and put beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6, 3), conv(6, 8, 3, stride=2), conv(8, 8, 3)
        self.up = nn.ConvTranspose2d(8, 5, 2, stride=2)
        self.out = nn.Sequential(conv(11, 7, 3), nn.Conv2d(7, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        up = self.up(self.c(self.b(a)))[:, :, 1:-1, 1:-1]
        y = torch.cat([a[:, :, 1:-1, 1:-1], up], 1)
        return self.out(y[:, :, :12])


class CatSlice(nn.Module):
    """Put together, then a part taken that has some of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6, 3), conv(3, 6, 3), conv(7, 8, 3)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.cat([self.a(x), self.b(x)], 1)[:, 3:10]))


class SuperResolution(nn.Module):
    """Residual blocks, then pixels out of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.a, self.b = conv(3, 8, 3), conv(8, 6, 3), nn.Conv2d(6, 8, 3, padding=1)
        self.up = nn.Conv2d(8, 20, 3, padding=1)
        self.out = nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        y = y + self.b(self.a(y))
        return self.out(F.relu(F.pixel_shuffle(self.up(y), 2)))


class Csp(nn.Module):
    """YOLO's: a half that goes on, all its stages put together."""

    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.split, self.out = conv(width, 2 * inner), conv(4 * inner, out)
        self.stages = nn.ModuleList(conv(inner, inner, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        found = list(self.split(x).chunk(2, 1))
        for stage in self.stages:
            found.append(found[-1] + stage(found[-1]))
        return self.out(torch.cat(found, 1))


class YoloNeck(nn.Module):
    """Two levels, up and down again, with heads on both."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = conv(3, 6, 3, stride=2), conv(6, 8, 3, stride=2)
        self.up, self.down = Csp(14, 4, 6), Csp(14, 3, 8)
        self.reduce = conv(6, 6, 3, stride=2)
        self.heads = nn.ModuleList(nn.Conv2d(width, 5, 1) for width in (6, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(x)
        high = self.high(low)
        up = self.up(torch.cat([F.interpolate(high, scale_factor=2.0), low], 1))
        down = self.down(torch.cat([self.reduce(up), high], 1))
        return self.heads[0](up), self.heads[1](down)


IMAGES: Mapping[str, Callable[[], nn.Module]] = {
    "cat_slice": CatSlice,
    "densenet": densenet,
    "googlenet": googlenet,
    "pixel_shuffle": SuperResolution,
    "regnet": regnet,
    "resnext": resnext,
    "shufflenet": shufflenet,
    "unet": UNet,
    "yolo_neck": YoloNeck,
}


def image_network(name: str) -> nn.Module:
    """One of the networks on images [b, 3, 16, 16], with weights and statistics of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = IMAGES[name]()
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for parameter in (norm.weight, norm.bias, norm.running_mean):
                    assert parameter is not None
                    nn.init.normal_(parameter, 0.5, 0.3)
    return module.eval()


def qwen2_moe() -> nn.Module:
    """Experts that a router picks, and one that all share behind a gate."""
    import transformers

    settings: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=20,
        moe_intermediate_size=10,
        shared_expert_intermediate_size=14,
        num_experts=5,
        num_experts_per_tok=2,
        use_cache=False,
        **settings,
    )
    config._experts_implementation = "batched_mm"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Qwen2MoeForCausalLM(config).eval()
