"""Relax and TIR to machine code, through the few passes that our kernels need.

This is what runs in the worker process (:mod:`netlathe.backends.tvm.worker`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tvm
import tvm_ffi
from tvm import relax, tirx

from netlathe.backends.tvm import toolchain
from netlathe.backends.tvm.lowering import Lowered, Lowering
from netlathe.backends.tvm.machine import Machine
from netlathe.backends.tvm.packing import Built

_PIPELINE = "netlathe"
_POOL = Path(__file__).with_name("pool.c")  # the threads of kernels
_LOOKS = ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")
_SIZES = ("vm.builtin.make_shape", "vm.builtin.make_prim_value")


def target(machine: Machine) -> Any:
    """TVM's target for a machine."""
    made: dict[str, Any] = {
        "kind": "llvm",
        "mcpu": machine.mcpu,
        "cl-opt": ["-vectorize-slp:bool=false"],
    }
    if machine.architecture != "x86_64":
        made["mtriple"] = f"{machine.architecture}-linux-gnu"
    if machine.attributes:
        made["mattr"] = list(machine.attributes)
    return tvm.target.Target(made)


def _tir_pipeline() -> tuple[Any, Any, Any]:
    """Our kernels have no blocks and state their loops: most of the default passes have nothing to do.

    TVM's simplifier is left out: LLVM does the same in far less time.
    """

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]  # TVM has no types
    def run(module: Any, _context: Any) -> Any:
        passes = tirx.transform
        return tvm.ir.transform.Sequential(
            [
                passes.VectorizeLoop(True),
                passes.AnnotateEntryFunc(),
                passes.SplitHostDevice(),
                passes.MakePackedAPI(),
            ]
        )(module)

    pipeline = tirx.compilation_pipeline
    return run, pipeline.finalize_host_passes, pipeline.finalize_device_passes


def relax_pipeline(constants: int = 0) -> Any:
    """From the calls that lowering emits to a program of the Relax VM.

    ``constants`` says how many of main's last parameters the program may take for what they should be.
    """
    passes = relax.transform
    return tvm.ir.transform.Sequential(
        [
            passes.ToNonDataflow(),
            passes.RemovePurityChecking(),
            passes.CallTIRRewrite(),
            passes.StaticPlanBlockMemory(),
            passes.LowerAllocTensor(),
            passes.KillAfterLastUse(),
            passes.LowerRuntimeBuiltin(),
            passes.ComputePrimValue(),
            passes.VMShapeLower(),
            _in_order(),
            _trusting(constants),
            _once(),
            passes.CanonicalizeBindings(),
            passes.AttachGlobalSymbol(),
        ]
    )


def _in_order() -> Any:
    """Sorts what VMShapeLower has written, so that the same model gives the same bytes.

    Its functions compute dims from other dims, each into a slot of its own, in an order that follows
    addresses in memory.
    """

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]  # TVM has no types
    def run(module: Any, _context: Any) -> Any:
        for name, function in module.functions_items():
            if not name.name_hint.startswith("shape_func") or not isinstance(
                function.body, tirx.SeqStmt
            ):
                continue
            stores = sorted(function.body.seq, key=lambda store: int(store.indices[0]))
            module.update_func(name, function.with_body(tirx.SeqStmt(stores)))
        return module

    return run


def _trusting(constants: int) -> Any:
    """Leaves out what looks at the types of main's last parameters, each time that it runs.

    The loader makes them as the description says, and every kernel looks at what it reads.
    """

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]  # TVM has no types
    def run(module: Any, _context: Any) -> Any:
        main = module["main"]
        known = set(main.params[len(main.params) - constants :])

        def looks(call: Any) -> bool:
            return (
                isinstance(call, tvm.ir.Call)
                and isinstance(call.op, relax.ExternFunc)
                and call.op.global_symbol in _LOOKS
                and call.args[0] in known
            )

        blocks = [
            relax.BindingBlock([b for b in block.bindings if not looks(b.value)])
            for block in main.body.blocks
        ]
        body = relax.SeqExpr(blocks, main.body.body)
        made = relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)
        module.update_func(module.get_global_var("main"), made)
        return module

    return run


def _once() -> Any:
    """Makes every size and shape that kernels are handed once a run, not once a kernel.

    VMShapeLower makes them of slots of a vector, each of which is written once, before it is read.
    """

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]  # TVM has no types
    def run(module: Any, _context: Any) -> Any:
        main = module["main"]
        made: dict[int, list[tuple[Any, Any]]] = {}

        def first(binding: Any) -> Any:
            call = binding.value
            if not isinstance(call, tvm.ir.Call) or not isinstance(call.op, relax.ExternFunc):
                return binding
            if call.op.global_symbol not in _SIZES:
                return binding
            same = made.setdefault(int(tvm_ffi.structural_hash(call)), [])
            for other, var in same:
                if tvm_ffi.structural_equal(call, other):
                    return relax.VarBinding(binding.var, var)
            same.append((call, binding.var))
            return binding

        blocks = [
            relax.BindingBlock([first(binding) for binding in block.bindings])
            for block in main.body.blocks
        ]
        body = relax.SeqExpr(blocks, main.body.body)
        function = relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)
        module.update_func(module.get_global_var("main"), function)
        return module

    return run


def executable(lowered: Lowered, machine: Machine) -> Any:
    """A Relax VM executable."""
    tirx.compilation_pipeline.register_tir_pipeline(_PIPELINE, _tir_pipeline)
    return relax.build(
        lowered.module,
        target(machine),
        relax_pipeline=relax_pipeline(len(lowered.parameters)),
        tir_pipeline=_PIPELINE,
    )


def linked_by(linker: Sequence[str], *others: str) -> Callable[..., None]:
    """What links object files, and what ``others`` say to the linker, to a library, as TVM calls it."""

    def link(output: str, objects: Sequence[str], **_options: Any) -> None:
        toolchain.run([*linker, "-shared", "-fPIC", "-o", output, *objects, *others])

    return link


def library(model: ir.Model, machine: Machine, path: Path, linker: Sequence[str]) -> Built:
    """Lower and compile ``model``, whose weights are not read, and link it to ``path``.

    Raises:
        LowerError: with every node that has no form here, or the linker failed.
    """
    lowered = Lowering(model, machine).run()
    # The library has threads that run its code, so that it stays once it is loaded.
    pool = ("-Wl,-z,nodelete", "-pthread", "-O2", "-x", "c", os.fspath(_POOL))
    link = linked_by(linker, *pool)
    executable(lowered, machine).export_library(os.fspath(path), fcompile=link)
    return Built(lowered.parameters, lowered.kernels, lowered.in_place)
