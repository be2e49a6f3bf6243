"""The process that compiles: ``python -m netlathe.backends.tvm.worker FOLDER PARENT``.

It reads ``job`` in the folder and writes ``answer`` there; see :mod:`netlathe.backends.tvm.process`, which
starts it. If TVM or a kernel crashes, this process dies and its parent says so. It dies with its
parent too, and leaves Ctrl-C to it.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
from pathlib import Path

import onnx
import onnx_ir as ir

from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.process import (
    ANSWER,
    JOB,
    Bare,
    Build,
    Each,
    Failed,
    Job,
    Lower,
    Refused,
    Run,
)
from netlathe.diagnostics import Diagnostic, LowerError

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Do the job in the folder that the command line names."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that call
        return
    # tvm_ffi imports torch if it can, which takes seconds and which nothing here needs.
    sys.modules["torch"] = None  # type: ignore[assignment]  # so documented: such an import fails
    answer: object
    try:
        answer = _do(pickle.loads((folder / JOB).read_bytes()))
    except LowerError as error:
        answer = Refused(error.diagnostics)
    except Exception:
        answer = Failed(traceback.format_exc())
    (folder / ANSWER).write_bytes(pickle.dumps(answer))


def _do(job: Job) -> object:
    match job:
        case Each():
            return _each(job)
        case Lower():
            from netlathe.backends.tvm.lowering import Lowering

            Lowering(_model(job.model), job.machine).run()
            return None
        case Build(machine=Gpu() as machine):
            from netlathe.backends.tvm.cuda import toolkit

            toolkit.load()  # before anything imports TVM
            from netlathe.backends.tvm.cuda import build as cuda

            return cuda.library(_model(job.model), machine, job.library, job.linker)
        case Build():
            from netlathe.backends.tvm import build

            return build.library(_model(job.model), job.machine, job.library, job.linker)
        case Bare():
            from netlathe.backends.tvm.arm import bare

            model = _model(job.model)
            return bare.program(model, job.machine, job.prefix, only_plan=job.only_plan)
        case Run():
            from netlathe.backends.tvm import runtime

            return runtime.load(job.folder).run(job.feeds)


def _each(job: Each) -> list[object]:
    done: list[object] = []
    refused: list[Diagnostic] = []
    for one in job.jobs:
        try:
            done.append(_do(one))
        except LowerError as error:
            refused += error.diagnostics
    if refused:
        raise LowerError(refused)
    return done


def _model(data: bytes) -> ir.Model:
    return ir.serde.deserialize_model(onnx.ModelProto.FromString(data))


if __name__ == "__main__":
    main()
