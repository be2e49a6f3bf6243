"""The networks that every change of a width must hold on, in their published structure.

Stages, layers, heads, groups and joins are those of the smallest published member of each family. Widths are
cut, and numbers of heads, experts and words with them. What Transformers has is made from a configuration,
the rest is in `images`. Weights are drawn as the zoo draws its own; MiniLM is the real one.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import nn

from netlathe.frontends.onnx_file import OnnxFile
from netlathe.frontends.torch_module import TorchModule
from tests import zoo
from tests.published import images
from tests.zoo import Recipe, hf

Feeds = Mapping[str, npt.NDArray[Any]]

_LOGITS = ("logits",)
_TEXT: dict[str, Any] = {
    "vocab_size": zoo.VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}


def _text(name: str, head: str, block: str, attention: str | None = None, **config: Any) -> Recipe:
    return Recipe(hf(name, head, attention, **_TEXT | config), "text", _LOGITS, (block,))


def _pictures(make: Callable[[], nn.Module], *blocks: str, side: int = 64, **rest: Any) -> Recipe:
    return Recipe(make, "image", _LOGITS, blocks, {"side": side}, **rest)


class OnlyLogits(nn.Module):
    """An encoder and decoder whose encoder states are not an output, so that no width is its caller's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, decoder_input_ids: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        return self.inner(decoder_input_ids=decoder_input_ids, **given).logits


class Text2Text(OnlyLogits):
    """From tokens."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        decoder_input_ids: torch.Tensor,
    ) -> torch.Tensor:
        return super().forward(
            decoder_input_ids, input_ids=input_ids, attention_mask=attention_mask
        )


class Speech2Text(OnlyLogits):
    """From a spectrogram."""

    def forward(  # type: ignore[override]
        self, input_features: torch.Tensor, decoder_input_ids: torch.Tensor
    ) -> torch.Tensor:
        return super().forward(decoder_input_ids, input_features=input_features)


def _layers(depth: int, width: int, hidden: int, heads: int, kv: int = 0) -> dict[str, Any]:
    found = {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
    }
    return found | ({"num_key_value_heads": kv} if kv else {})


_RECIPES: Mapping[str, Recipe] = {
    # -- images ---------------------------------------------------------------------------------------
    "resnet50": _pictures(
        hf("ResNet", "ForImageClassification", embedding_size=8, hidden_sizes=[32, 64, 128, 256],
           depths=[3, 4, 6, 3], num_labels=10),
        "ResNetBottleNeckLayer",
    ),
    "mobilenet_v2": _pictures(
        hf("MobileNetV2", "ForImageClassification", depth_multiplier=0.25, image_size=64,
           num_labels=10),
        "MobileNetV2InvertedResidual",
        calmed=("reduce_1x1.normalization", 0.5),
    ),
    "efficientnet_b0": _pictures(
        hf("EfficientNet", "ForImageClassification", image_size=64, width_coefficient=0.25,
           depth_coefficient=1.0, hidden_dim=320, num_labels=10),
        "EfficientNetBlock",
    ),
    "resnext50": _pictures(images.resnext50, "Bottleneck"),
    "regnet_y": _pictures(
        hf("RegNet", "ForImageClassification", embedding_size=8, hidden_sizes=[16, 24, 64, 136],
           depths=[2, 6, 12, 2], groups_width=8, num_labels=10),
        "RegNetYLayer",
    ),
    "densenet121": _pictures(images.densenet121, "DenseLayer"),
    "googlenet": _pictures(images.googlenet, "Inception"),
    "shufflenet_v2": _pictures(images.shufflenet_v2, "ShuffleUnit"),
    "channel_shuffle": _pictures(images.shufflenet_v1, "GroupedUnit"),
    "convnext_t": _pictures(
        hf("ConvNext", "ForImageClassification", hidden_sizes=[12, 24, 48, 96],
           depths=[3, 3, 9, 3], image_size=64, num_labels=10, layer_scale_init_value=1.0),
        "ConvNextLayer",
    ),
    "unet": _pictures(images.UNet, "Sequential"),
    "super_resolution": _pictures(images.SuperResolution, "ResidualBlock", side=16),
    "yolo_neck": _pictures(images.Yolo, "Csp"),
    "vit_b": _pictures(
        hf("ViT", "ForImageClassification", **_layers(12, 96, 192, 12), image_size=64,
           patch_size=16, num_labels=10),
        "ViTLayer",
    ),
    "swin_t": _pictures(
        hf("Swin", "ForImageClassification", "eager", image_size=56, patch_size=1, embed_dim=24,
           depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, num_labels=10),
        "SwinLayer",
        side=56,
    ),
    "segformer_b0": _pictures(
        hf("Segformer", "ForSemanticSegmentation", hidden_sizes=[8, 16, 40, 64],
           num_attention_heads=[1, 2, 5, 8], decoder_hidden_size=32, num_labels=10),
        "SegformerLayer",
    ),
    # -- text -----------------------------------------------------------------------------------------
    "minilm": Recipe(
        lambda: zoo.build("minilm").module, "text", ("last_hidden_state", "pooler_output"),
        ("BertLayer",), trained=True,
    ),
    "bert": _text("Bert", "ForMaskedLM", "BertLayer", **_layers(12, 96, 192, 12)),
    "gpt2": Recipe(
        hf("GPT2", "LMHeadModel", vocab_size=zoo.VOCAB, n_embd=96, n_layer=12, n_head=12,
           n_positions=64, bos_token_id=1, eos_token_id=2, use_cache=False),
        "text", _LOGITS, ("GPT2Block",),
    ),
    "opt": _text("OPT", "ForCausalLM", "OPTDecoderLayer", num_hidden_layers=12, hidden_size=96,
                 num_attention_heads=12, ffn_dim=192, word_embed_proj_dim=96),
    "llama": _text("Llama", "ForCausalLM", "LlamaDecoderLayer", **_layers(32, 64, 160, 8, 2)),
    "mistral": _text("Mistral", "ForCausalLM", "MistralDecoderLayer",
                     **_layers(32, 64, 160, 8, 2), sliding_window=8),
    "qwen2": _text("Qwen2", "ForCausalLM", "Qwen2DecoderLayer", **_layers(24, 112, 160, 14, 2),
                   tie_word_embeddings=True),
    "phi": _text("Phi", "ForCausalLM", "PhiDecoderLayer", **_layers(24, 64, 160, 8, 8)),
    "gemma": Recipe(
        hf("Gemma", "ForCausalLM", **_TEXT, **_layers(18, 64, 160, 8, 1), head_dim=16),
        "text", _LOGITS, ("GemmaDecoderLayer",),
        calmed=("layernorm", 0.1),  # these norms multiply by 1 + their weight
    ),
    "falcon": _text("Falcon", "ForCausalLM", "FalconDecoderLayer", "eager",
                    num_hidden_layers=32, hidden_size=64, num_attention_heads=8,
                    new_decoder_architecture=False),
    "t5": Recipe(
        lambda: Text2Text(
            hf("T5", "ForConditionalGeneration", "eager", vocab_size=zoo.VOCAB, d_model=64, d_kv=8,
               d_ff=128, num_layers=6, num_decoder_layers=6, num_heads=8,
               decoder_start_token_id=0, use_cache=False)()
        ),
        "seq2seq", _LOGITS, ("T5Block",),
    ),
    "whisper": Recipe(
        lambda: Speech2Text(
            hf("Whisper", "ForConditionalGeneration", vocab_size=zoo.VOCAB, d_model=48,
               encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
               decoder_attention_heads=6, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=16,
               max_source_positions=20, max_target_positions=32, pad_token_id=0, bos_token_id=1,
               eos_token_id=2, decoder_start_token_id=1, use_cache=False)()
        ),
        "speech", _LOGITS, ("WhisperEncoderLayer", "WhisperDecoderLayer"),
        {"mel": 16, "frames": 40},
    ),
    "mixtral": _text("Mixtral", "ForCausalLM", "MixtralDecoderLayer", **_layers(32, 64, 48, 8, 2),
                     num_local_experts=8, num_experts_per_tok=2),
    "qwen2_moe": _text("Qwen2Moe", "ForCausalLM", "Qwen2MoeDecoderLayer",
                       **_layers(24, 64, 48, 8, 8), moe_intermediate_size=20,
                       shared_expert_intermediate_size=48, num_experts=8, num_experts_per_tok=4),
}  # fmt: skip

NAMES: tuple[str, ...] = tuple(_RECIPES)


def some(*names: str) -> list[Any]:
    """Parameters for every network; those that are not named are slow."""
    slow = pytest.mark.slow
    return [name if name in names else pytest.param(name, marks=slow) for name in NAMES]


@lru_cache(maxsize=2)
def build(name: str) -> zoo.ZooModel:
    """A network with its weights, and what it takes to call and to capture it."""
    return zoo.made(name, _RECIPES[name])


def feeds(name: str, seed: int = 0) -> list[dict[str, npt.NDArray[Any]]]:
    """Feeds at two sizes."""
    built = build(name)
    each = (built.feeds(sizes, seed + at) for at, sizes in enumerate(built.sizes))
    return [{key: tensor.numpy() for key, tensor in fed.items()} for fed in each]


def captured(name: str) -> ir.Model:
    """The network as a frontend captures it from PyTorch, in normal form."""
    return _captured(name).clone()


@lru_cache(maxsize=2)
def _captured(name: str) -> ir.Model:
    def make(path: Path) -> None:
        built = build(name)
        frontend = TorchModule(kwargs=built.kwargs, dynamic=built.dynamic)
        ir.save(frontend.capture(built.module).model, path)

    return ir.load(_kept(f"{name}.captured", make))


def from_file(name: str) -> ir.Model:
    """The network as a frontend reads it from an ONNX file."""
    return OnnxFile().capture(exported(name)).model


def exported(name: str) -> Path:
    """The file that PyTorch exports of a network by default."""

    def make(path: Path) -> None:
        built = build(name)
        names = {dim for dims in built.dynamic.values() for dim in dims.values()}
        dims = {dim: torch.export.Dim(dim, min=2, max=4096) for dim in names}
        torch.onnx.export(
            built.module,
            kwargs=built.kwargs,
            f=path,
            dynamic_shapes={
                key: {at: dims[dim] for at, dim in of.items()} for key, of in built.dynamic.items()
            },
            external_data=False,
            verbose=False,
        )

    return _kept(f"{name}.exported", make)


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """A file made once; its name tells from what."""
    sources = (Path(__file__), Path(images.__file__), Path(zoo.__file__))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    versions = f"torch{torch.__version__}-transformers{transformers.__version__}"
    path = (
        Path(tempfile.gettempdir()) / "netlathe-published" / f"{versions}-{digest}" / f"{name}.onnx"
    )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            make(Path(scratch) / path.name)
            (Path(scratch) / path.name).replace(path)
    return path
