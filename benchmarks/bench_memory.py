"""Peak memory of compiling a weight-only int8 model, against the size of its weights.

    python benchmarks/bench_memory.py

Writes a LLaMA with random float32 weights (1.7 GB; 8 layers, 2048 wide, grouped-query attention) in shards,
compiles it with the command line in a process of its own and reads that process' largest resident set,
mapped pages included. Bar: below the size of the weights plus 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB = 2048, 5632, 8, 32, 8, 32000
GIB = 1 << 30


def write_model(folder: Path, layers: int) -> int:
    """A Hugging Face directory, one shard a layer; bytes of its weights."""
    kv = HIDDEN // HEADS * KV_HEADS
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    where: dict[str, str] = {}
    total = 0

    def shard(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        tensors = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                tensors[name] = np.ones(shape, np.float32)
            else:
                scale = np.float32(shape[-1] ** -0.5)
                tensors[name] = rng.standard_normal(shape, np.float32) * scale
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file)
        where.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())

    shard(0, {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)})
    for layer in range(layers):
        root = f"model.layers.{layer}."
        shard(
            layer + 1,
            {
                root + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
                root + "self_attn.k_proj.weight": (kv, HIDDEN),
                root + "self_attn.v_proj.weight": (kv, HIDDEN),
                root + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
                root + "mlp.gate_proj.weight": (FFN, HIDDEN),
                root + "mlp.up_proj.weight": (FFN, HIDDEN),
                root + "mlp.down_proj.weight": (HIDDEN, FFN),
                root + "input_layernorm.weight": (HIDDEN,),
                root + "post_attention_layernorm.weight": (HIDDEN,),
            },
        )
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        print(f"writing {arguments.layers} layers", flush=True)
        weights = write_model(folder, arguments.layers)
        command = [sys.executable, "-m", "netlathe", "compile", str(folder)]
        command += ["--passes", 'quantize(weights="int8")', "-o", str(Path(scratch) / "out")]
        subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    bar = weights + GIB
    print(f"weights {weights / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB, bar {bar / GIB:.2f} GiB")
    return 0 if peak < bar else 1


if __name__ == "__main__":
    sys.exit(main())
