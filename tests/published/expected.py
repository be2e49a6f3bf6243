"""What may be pruned in each of the published networks, counted by hand from its structure.

``Expected(channels={16: 8})``: eight groups of 16 positions. The names are the scopes of `prune`; what no
scope prunes is under ``head_dim`` (the width of a head, or its rotary pairs, which all layers share) or
``rows`` (what channel shuffles tie together).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

Sizes = Mapping[int, int]


@dataclass(frozen=True)
class Expected:
    """How many groups of each size each scope has, and words from the reasons that pin others."""

    channels: Sizes = field(default_factory=dict)
    ffn: Sizes = field(default_factory=dict)
    heads: Sizes = field(default_factory=dict)
    kv_groups: Sizes = field(default_factory=dict)
    experts: Sizes = field(default_factory=dict)
    hidden: Sizes = field(default_factory=dict)
    head_dim: Sizes = field(default_factory=dict)
    rows: Sizes = field(default_factory=dict)
    pinned: tuple[str, ...] = ("graph output",)

    @property
    def sizes(self) -> Counter[int]:
        """How many groups there are of each size."""
        total: Counter[int] = Counter()
        for scope in (self.channels, self.ffn, self.heads, self.kv_groups, self.experts):
            total.update(scope)
        for scope in (self.hidden, self.head_dim, self.rows):
            total.update(scope)
        return total


def _sum(*each: Sizes) -> Counter[int]:
    total: Counter[int] = Counter()
    for sizes in each:
        total.update(sizes)
    return total


_IMAGE = ("graph input pixel_values", "graph output", "slides a window")
_WORDS = ("graph input input_ids holds", "graph output")
_ROTARY = (*_WORDS, "turns pairs")

EXPECTED: Mapping[str, Expected] = {
    # Stem; a stream per stage; two inner widths per block.
    "resnet50": Expected(
        channels=_sum({8: 1}, {8: 6, 16: 8, 32: 12, 64: 6}),
        hidden={32: 1, 64: 1, 128: 1, 256: 1},
        pinned=_IMAGE,
    ),
    # Stem and head; seven streams, residual where a stage has several blocks; six times the width in each
    # of 16 blocks.
    "mobilenet_v2": Expected(
        channels=_sum(
            {8: 1, 1280: 1},
            {8: 1, 80: 1},
            {48: 6, 96: 4, 144: 3, 240: 3},
        ),
        hidden={8: 2, 16: 1, 24: 1, 40: 1},
        pinned=_IMAGE,
    ),
    # Stem and head; seven streams; 15 expanded widths; 16 squeezed ones, a quarter of the input.
    "efficientnet_b0": Expected(
        channels=_sum(
            {8: 1, 320: 1},
            {8: 1, 80: 1},
            {48: 3, 96: 2, 144: 3, 192: 3, 288: 4},
            {2: 4, 4: 2, 6: 3, 8: 3, 12: 4},
        ),
        hidden={8: 1, 16: 1, 24: 1, 32: 1, 48: 1},
        pinned=_IMAGE,
    ),
    # Stem; streams; per block the groups (8), and the channels of each before and after the 3x3.
    "resnext50": Expected(
        channels=_sum({8: 1}, {8: 16}, {2: 6, 4: 8, 8: 12, 16: 6}),
        hidden={32: 1, 64: 1, 128: 1, 256: 1},
        pinned=_IMAGE,
    ),
    # As ResNeXt with groups of 8 channels; 22 squeezed widths, a quarter of the block's input.
    "regnet_y": Expected(
        channels=_sum(
            {8: 1},
            {2: 2, 3: 6, 8: 12, 17: 2},
            {8: 44},
            {2: 1, 4: 2, 6: 6, 16: 12, 34: 1},
        ),
        hidden={16: 1, 24: 1, 64: 1, 136: 1},
        pinned=_IMAGE,
    ),
    # Stem; transitions; in each of 58 layers the bottleneck and what it adds.
    "densenet121": Expected(
        channels=_sum({8: 1}, {16: 1, 32: 1, 64: 1}, {16: 58, 4: 58}), pinned=_IMAGE
    ),
    # Three stem convolutions; six widths in each of nine modules (an eighth of the paper's table).
    "googlenet": Expected(
        channels=_sum(
            {8: 2, 24: 1},
            {8: 1, 12: 1, 16: 1, 2: 1, 4: 2},  # 3a
            {16: 2, 24: 1, 4: 1, 12: 1, 8: 1},  # 3b
            {24: 1, 12: 1, 26: 1, 2: 1, 6: 1, 8: 1},  # 4a
            {20: 1, 14: 1, 28: 1, 3: 1, 8: 2},  # 4b
            {16: 2, 32: 1, 3: 1, 8: 2},  # 4c
            {14: 1, 18: 1, 36: 1, 4: 1, 8: 2},  # 4d
            {32: 1, 20: 1, 40: 1, 4: 1, 16: 2},  # 4e
            {32: 1, 20: 1, 40: 1, 4: 1, 16: 2},  # 5a
            {48: 2, 24: 1, 6: 1, 16: 2},  # 5b
        ),
        pinned=_IMAGE,
    ),
    # Stem and head, the branch of each of 16 units; then what the shuffles of the units tie together, which
    # nobody counts by hand: the oracle does.
    "shufflenet_v2": Expected(
        channels=_sum({8: 1, 128: 1}, {14: 4, 28: 8, 56: 4}, {14: 2, 28: 1, 7: 4, 3: 2}),
        rows={1: 7},
        pinned=(*_IMAGE, "sees it as one row of several"),
    ),
    # The stem is 8 of 48 channels of the first stage, the others are in two groups: all are 12 times 4.
    "channel_shuffle": Expected(
        channels=_sum({3: 4, 6: 8, 12: 4}, {2: 1}),
        hidden={4: 1},
        pinned=(*_IMAGE, "in the number of its groups and in the channels of each"),
    ),
    # Levels of two convolutions down; an upsampling and two convolutions for each of four up.
    "unet": Expected(
        channels=_sum(
            {6: 2, 12: 2, 24: 2, 48: 2, 96: 2}, {6: 1, 12: 1, 24: 1, 48: 1},
            {6: 2, 12: 2, 24: 2, 48: 2},
        ),
        pinned=_IMAGE,
    ),
    # The stream, 16 inner widths, and the channels left by each pixel shuffle.
    "super_resolution": Expected(
        channels={12: 16 + 2}, hidden={12: 1}, pinned=(*_IMAGE, "lays blocks of them out in space")
    ),
    # C2f has two halves, an inner width a stage, a join; its stages have outputs of their own where they
    # are not added to the second half.
    "yolo_neck": Expected(
        channels=_sum(
            {8: 1, 16: 1}, {8: 2, 16: 1},  # stem
            {32: 1}, {16: 3, 32: 1}, {64: 1}, {32: 3, 64: 1}, {64: 1}, {32: 2, 64: 1},  # p3 to p5
            {32: 1, 64: 1},  # pyramid
            {32: 4, 64: 1}, {16: 4, 32: 1},  # up
            {32: 1, 64: 1}, {32: 4, 64: 1}, {32: 4, 64: 1},  # down
            {16: 3},  # heads
        ),
        hidden={8: 1, 16: 1, 32: 2},
        pinned=_IMAGE,
    ),
    # A stream per stage, four times its width in each block.
    "convnext_t": Expected(
        hidden={12: 1, 24: 1, 48: 1, 96: 1}, ffn={48: 3, 96: 3, 192: 9, 384: 3}, pinned=_IMAGE
    ),
    "vit_b": Expected(
        hidden={96: 1}, ffn={192: 12}, heads={12: 12}, head_dim={8: 24}, pinned=_IMAGE
    ),
    "swin_t": Expected(
        hidden={24: 1, 48: 1, 96: 1, 192: 1},
        ffn={96: 2, 192: 2, 384: 6, 768: 2},
        heads={3: 2, 6: 2, 12: 6, 24: 2},
        head_dim={8: 24},
        pinned=_IMAGE,
    ),
    # Keys are reduced by a convolution in three of four stages; a decoder width for each stage.
    "segformer_b0": Expected(
        hidden={8: 1, 16: 1, 40: 1, 64: 1},
        ffn={32: 2, 64: 2, 160: 2, 256: 2},
        heads={2: 2, 5: 2, 8: 2},
        head_dim={8: 16},
        channels={8: 2, 16: 2, 40: 2, 32: 5},
        pinned=_IMAGE,
    ),
    "minilm": Expected(
        ffn={1536: 6}, heads={12: 6}, head_dim={32: 12},
        pinned=(*_WORDS, "graph output last_hidden_state", "graph output pooler_output"),
    ),
    "bert": Expected(
        hidden={96: 1}, ffn={192: 12}, heads={12: 12}, head_dim={8: 24}, pinned=_WORDS
    ),
    "gpt2": Expected(
        hidden={96: 1}, ffn={384: 12}, heads={12: 12}, head_dim={8: 24}, pinned=_WORDS
    ),
    "opt": Expected(
        hidden={96: 1}, ffn={192: 12}, heads={12: 12}, head_dim={8: 24}, pinned=_WORDS
    ),
    **dict.fromkeys(
        ("llama", "mistral"),
        Expected(hidden={64: 1}, ffn={160: 32}, kv_groups={2: 32}, heads={4: 32},
                 head_dim={8: 32, 4: 1}, pinned=_ROTARY),
    ),
    "qwen2": Expected(hidden={112: 1}, ffn={160: 24}, kv_groups={2: 24}, heads={7: 24},
                      head_dim={8: 24, 4: 1}, pinned=_ROTARY),
    # Half of each head turns: two pairs, and four positions that do not.
    "phi": Expected(hidden={64: 1}, ffn={160: 24}, heads={8: 24}, head_dim={8: 24, 2: 1, 4: 24},
                    pinned=_ROTARY),
    "gemma": Expected(hidden={64: 1}, ffn={160: 18}, heads={8: 18}, head_dim={16: 18, 8: 1},
                      pinned=_ROTARY),
    # One reshape splits queries, key and value: heads are of one width.
    "falcon": Expected(hidden={64: 1}, ffn={256: 32}, heads={8: 32}, head_dim={4: 1},
                       pinned=_ROTARY),
    # All layers of a stack share one position bias, which has a column per head.
    "t5": Expected(hidden={64: 1}, ffn={128: 12}, heads={8: 3}, head_dim={8: 36}, pinned=_WORDS),
    "whisper": Expected(
        hidden={48: 2}, channels={48: 1}, ffn={96: 8}, heads={6: 12}, head_dim={8: 24},
        pinned=("graph input input_features", "graph output"),
    ),
    "mixtral": Expected(hidden={64: 1}, ffn={48: 32}, experts={8: 32}, kv_groups={2: 32},
                        heads={4: 32}, head_dim={8: 32, 4: 1}, pinned=_ROTARY),
    "qwen2_moe": Expected(hidden={64: 1}, ffn={20: 24, 48: 24}, experts={8: 24}, heads={8: 24},
                          head_dim={8: 24, 4: 1}, pinned=_ROTARY),
}  # fmt: skip
