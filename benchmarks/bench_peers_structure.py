"""Structured pruning of the same networks by NetLathe and by others: what comes out, and does it run.

    python -m venv peers
    peers/bin/pip install torch-pruning==1.6.1 onnxsim==0.8.1 torch transformers onnxruntime
    python benchmarks/bench_peers_structure.py --peers peers/bin/python [NETWORK ...]

Every network is to lose half of every width, its classes or words excepted. Torch-Pruning gets the module,
its last layer as ignored, the head counts where it can use them, and L2 group norms; onnxsim's head pruning
gets the file that PyTorch exports, simplified by onnxsim. A result counts as right if it runs on two batch
sizes with the output shape of the original and has fewer parameters; ours must also equal its masked
reference to 1e-4 of the output's RMS, which the others have none of. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from netlathe.frontends.torch_module import TorchModule
from tests.analysis.axes.architectures import image_network
from tests.published import networks

ROOT = Path(__file__).parent.parent
LIMIT_S = 1800
RATIO = 0.5
HEADS = ("vit_b", "swin_t", "llama", "bert")  # for onnxsim
STRUCTURE: Mapping[str, str] = {  # network: its last layer
    "resnet50": "classifier.1",
    "shufflenet_v2": "head",
    "cat_slice": "head",
    "super_resolution": "out",
    "swin_t": "classifier",
    "bert": "cls.predictions.decoder",
    "gpt2": "lm_head",
    "llama": "lm_head",
}


def _network(name: str) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """A network and feeds at two sizes."""
    if name == "cat_slice":
        rng = torch.Generator().manual_seed(0)
        return image_network(name), [
            {"x": torch.randn(b, 3, 16, 16, generator=rng)} for b in (2, 3)
        ]
    built = networks.build(name)
    return built.module, [built.feeds(sizes, seed) for seed, sizes in enumerate(built.sizes)]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())  # tied ones once


def _output(module: nn.Module, fed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out = module(**fed)
    found = out if isinstance(out, torch.Tensor) else out[0]
    assert isinstance(found, torch.Tensor)
    return found


# -- the others, each in a process of its own ------------------------------------------------------------


def torch_pruning(name: str) -> dict[str, Any]:
    """Half of every width by Torch-Pruning."""
    import torch_pruning as tp  # type: ignore[import-not-found,unused-ignore]  # in the peers' environment

    module, feeds = _network(name)
    before, expected = _count(module), [_output(module, fed).shape for fed in feeds]
    heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    projections = [
        layer
        for path, layer in module.named_modules()
        if path.endswith(("query", "key", "value", "q_proj", "k_proj", "v_proj"))
    ]
    options: dict[str, Any] = {}
    if isinstance(heads, int):
        kv = getattr(module.config, "num_key_value_heads", heads)
        options["num_heads"] = {
            layer: heads if layer.out_features == projections[0].out_features else kv
            for layer in projections
        }
    pruner = tp.pruner.BasePruner(
        module,
        feeds[0],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=[module.get_submodule(STRUCTURE[name])],
        output_transform=lambda out: out if isinstance(out, torch.Tensor) else out[0],
        **options,
    )
    pruner.step()
    found = [_output(module, fed) for fed in feeds]
    return _judged(
        before, _count(module), [list(s) for s in expected], [list(y.shape) for y in found]
    )


def onnxsim_heads(name: str) -> dict[str, Any]:
    """Half of the heads by onnxsim, of the exported file."""
    import onnx
    import onnxruntime
    import onnxsim  # type: ignore[import-not-found,unused-ignore]  # in the peers' environment

    networks.from_file(name)  # makes the file
    simplified = onnxsim.simplify(onnx.load(networks.exported(name)))[0]
    pruned = onnxsim.pruning.apply_attention_head_pruning(simplified, RATIO)
    counts = [
        sum(ir.from_proto(tensor).size for tensor in model.graph.initializer)
        for model in (simplified, pruned)
    ]
    session = onnxruntime.InferenceSession(pruned.SerializeToString())
    shapes = []
    for fed in networks.feeds(name):
        known = {value.name for value in session.get_inputs()}
        (out, *_) = session.run(None, {key: array for key, array in fed.items() if key in known})
        shapes.append(list(np.asarray(out).shape))
    module, feeds = _network(name)
    return _judged(
        counts[0], counts[1], [list(_output(module, fed).shape) for fed in feeds], shapes
    )


def ours(name: str, **options: Any) -> dict[str, Any]:
    """Half of every width, or of some scopes, by NetLathe."""
    from netlathe.passes.prune import Prune
    from tests.passes.prune.helpers import error_to_reference, pruned

    module, feeds = _network(name)
    if name == "cat_slice":
        frontend = TorchModule(kwargs=feeds[0], dynamic={"x": {0: "batch"}})
        model = frontend.capture(module).model
    else:
        model = networks.captured(name)
    pass_ = Prune(ratio=RATIO, **options)
    after, chosen = pruned(model, pass_)
    arrays = [{key: tensor.numpy() for key, tensor in fed.items()} for fed in feeds]
    error = error_to_reference(model, after, pass_, chosen, arrays)
    counts = [_weights(model), _weights(after)]
    found = _judged(counts[0], counts[1], [[]], [[]])
    return found | {"error": error, "right": found["right"] and error <= 1e-4}


def _weights(model: ir.Model) -> int:
    from netlathe.analysis.cost import cost

    return cost(model).params


def _judged(before: int, after: int, expected: Any, shapes: Any) -> dict[str, Any]:
    why = ""
    if shapes != expected:
        why = f"output {shapes[0]}, not {expected[0]}"
    elif after >= before:
        why = "nothing pruned" if after == before else "more parameters than before"
    return {"before": before, "after": after, "right": not why, "why": why}


METHODS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "torch-pruning": torch_pruning,
    "onnxsim": onnxsim_heads,
    "netlathe": ours,
    "netlathe heads": lambda name: ours(name, scope=("heads", "kv_groups")),
}


def child(python: str, method: str, name: str) -> dict[str, Any]:
    """Run a method in a process of its own; what went wrong is a result."""
    command = [python, str(Path(__file__)), "--child", method, name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return {"right": False, "why": f"not done in {LIMIT_S} s"}
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"right": False, "why": last}


def shown(found: Mapping[str, Any]) -> str:
    """``97,362 -> 27,101`` or why not."""
    counts = f"{found['before']:,} -> {found['after']:,}" if "before" in found else ""
    if found["right"]:
        return counts
    return f"FAILS: {found['why'][:110]}" + (f" ({counts})" if counts else "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers", help="Python of an environment with the peers; without it, only ours"
    )
    parser.add_argument("names", nargs="*", metavar="NETWORK", help="only these")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        method, name = options.child
        print(json.dumps(METHODS[method](name)))
        return 0
    wrong = []
    print("| network | peer | NetLathe | error to the reference |\n|---|---|---|---|")
    tables = (("torch-pruning", "netlathe", tuple(STRUCTURE)), ("onnxsim", "netlathe heads", HEADS))
    for peer, method, names in tables:
        for name in (name for name in names if name in (options.names or names)):
            theirs = shown(child(options.peers, peer, name)) if options.peers else "not run"
            mine = child(sys.executable, method, name)
            error = f"{mine['error']:.1e}" if "error" in mine else ""
            print(f"| {name} | {peer}: {theirs} | {shown(mine)} | {error} |", flush=True)
            wrong += [] if mine["right"] else [name]
    print("bar: all of ours right: " + (f"missed by {', '.join(wrong)}" if wrong else "met"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
