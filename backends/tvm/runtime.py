"""Loads and runs an artifact of NetLathe's TVM backend; this file is copied into every artifact.

    model = load("folder", threads=2)
    outputs = model(input_ids=ids, attention_mask=mask)      # a dict of numpy arrays

It needs Python 3.11, numpy, ``apache-tvm-ffi`` and ``libtvm_runtime.so`` (from the ``apache-tvm``
wheel, from this folder, or wherever NETLATHE_TVM_RUNTIME points). No compiler, torch or onnx.

Nothing of the model's library runs before the CPU is known to have the instructions it was built for. An
artifact for CUDA also needs ``libtvm_runtime_cuda.so`` (beside the other one), CUDA's runtime library, and
a GPU of an architecture that it has machine code for; constants are uploaded once, when it is loaded.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import math
import mmap
import operator
import os
import platform
from collections.abc import Callable, Mapping, Sequence, Set
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

META_FILE = "meta.json"
LIBRARY_FILE = "model.so"
PARAMETERS_FILE = "params.bin"
FORMAT = 5
ALIGNMENT = 64  # bytes, of constants in their file: no vector of them lies across two cache lines
GPU_VECTOR = (
    16  # bytes that a thread loads at once, and multiples of which the copy engine copies from
)

_KEYS = {
    "inputs",
    "outputs",
    "in_place",
    "architecture",
    "features",
    "cpu_features",
    "versions",
    "sha256",
    "parameter_bytes",
    "parameters",
}
_RUNTIME = "libtvm_runtime.so"
_CPU, _CUDA = 1, 2  # DLPack's device types
_POOLED = 2  # the allocator that keeps memory for the next run
_loaded: list[ctypes.CDLL] = []
_libraries: dict[Path, ctypes.CDLL] = {}  # of kernels for a CPU
_threads: list[int] = []  # that they use, once it is said


# Features of aarch64 as Linux shows them to programs: entry of the auxiliary vector, bit.
_HWCAP, _HWCAP2 = 16, 26
HWCAPS: Mapping[str, tuple[int, int]] = {
    "fp": (_HWCAP, 0),
    "asimd": (_HWCAP, 1),
    "fphp": (_HWCAP, 9),
    "asimdhp": (_HWCAP, 10),
    "asimdrdm": (_HWCAP, 12),
    "fcma": (_HWCAP, 14),
    "asimddp": (_HWCAP, 20),
    "asimdfhm": (_HWCAP, 23),
    "i8mm": (_HWCAP2, 13),
}
# Features of x86-64 as CPUID shows them: leaf (by glibc's number), register (eax, ebx, ecx, edx), bit.
CPUIDS: Mapping[str, tuple[int, int, int]] = {
    "fma": (0, 2, 12),
    "movbe": (0, 2, 22),
    "avx": (0, 2, 28),
    "f16c": (0, 2, 29),
    "bmi1": (1, 1, 3),
    "avx2": (1, 1, 5),
    "bmi2": (1, 1, 8),
    "avx512f": (1, 1, 16),
    "avx512dq": (1, 1, 17),
    "avx512cd": (1, 1, 28),
    "avx512bw": (1, 1, 30),
    "avx512vl": (1, 1, 31),
    "avx512_vnni": (1, 2, 11),
    "abm": (2, 2, 5),
}


class ArtifactError(Exception):
    """The artifact cannot be used here, or not with these inputs; the message says why."""


def cpu_features() -> frozenset[str]:
    """What this CPU can do, in the words of Linux."""
    if platform.machine() == "aarch64":
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        return frozenset(
            name for name, (entry, bit) in HWCAPS.items() if getauxval(entry) >> bit & 1
        )
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split()) - _inactive()
    return frozenset()


def _inactive() -> set[str]:
    """Features that this process must not use, whatever /proc says: in an emulator it speaks of the host.

    glibc 2.33 and later know from the CPU itself; where there is none, nothing is.
    """
    try:
        leaf = getattr(ctypes.CDLL(None), "__x86_get_cpuid_feature_leaf")
    except AttributeError:
        return set()
    # Four registers as CPUID has them, then the same without what the system does not support.
    leaf.restype, leaf.argtypes = ctypes.POINTER(ctypes.c_uint32 * 8), [ctypes.c_uint]
    return {
        name
        for name, (number, register, bit) in CPUIDS.items()
        if not leaf(number).contents[4 + register] >> bit & 1
    }


def load(folder: str | os.PathLike[str], *, threads: int | None = None) -> Model:
    """The model in ``folder``.

    ``threads`` holds for the process (see :func:`set_threads`). None leaves it as it is, and at first
    means TVM_NUM_THREADS, else OMP_NUM_THREADS, else one for each CPU that this process may use and that the
    limits of its container, if any, leave it, at most 256.

    Raises:
        ArtifactError: files are missing, damaged or of another version, or the CPU lacks instructions.
    """
    path = Path(folder).resolve()  # dlopen looks for a bare name elsewhere
    meta = _read_meta(path)
    _check_cpu(meta)
    _check_versions(meta)
    _check_library(path, meta)
    _runtime(path)
    if meta.get("archs"):
        check_gpu(meta["archs"])
        _cuda_runtime(path)
    if threads is not None:
        set_threads(threads)
    return Model(meta, path / LIBRARY_FILE, _parameters(path, meta))


class Model:
    """An artifact in memory. ``inputs`` and ``outputs`` are the records of ``meta.json``.

    ``in_place`` maps names of outputs to names of inputs: such an output, a cache of which a call replaces
    some rows, is the input's tensor. :meth:`invoke` writes into what it is given; arrays are copied first.
    """

    def __init__(
        self, meta: dict[str, Any], library: Path, parameters: Sequence[npt.NDArray[Any]]
    ) -> None:
        self.meta = meta
        self.inputs: list[dict[str, Any]] = meta["inputs"]
        self.outputs: list[dict[str, Any]] = meta["outputs"]
        self.in_place: dict[str, str] = meta["in_place"]
        self._ffi = _runtime(library.parent)
        self._on_gpu = bool(meta.get("archs"))
        self._vector = GPU_VECTOR if self._on_gpu else 1
        self._written = set(self.in_place.values())
        if self._on_gpu:
            cudart = _cuda_runtime(library.parent)
            _check_room(cudart, sum(array.nbytes for array in parameters))
        self._parameters = [self._placed(array) for array in parameters]
        self._module = self._ffi.load_module(os.fspath(library))
        if not self._on_gpu:
            _libraries[library] = ctypes.CDLL(os.fspath(library))
            if _threads:
                _libraries[library].netlathe_set_threads(_threads[0])
        self._main = self._started()

    def _started(self) -> Callable[..., Sequence[Any]]:
        """The program, started: it has the functions that tvm_ffi knows at this moment."""
        machine = self._module["vm_load_executable"]()
        devices = [_CUDA, 0, _POOLED] if self._on_gpu else []
        machine["vm_initialization"](*devices, _CPU, 0, _POOLED)
        main: Callable[..., Sequence[Any]] = machine["main"]
        return main

    def __call__(self, **feeds: npt.ArrayLike) -> dict[str, npt.NDArray[Any]]:
        """Run once; see :meth:`run`."""
        return self.run({name: np.asarray(value) for name, value in feeds.items()})

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run once: arrays by input name to arrays by output name.

        Raises:
            ArtifactError: a name, dtype or shape is not the model's, or the GPU's memory is full.
        """
        results = self.invoke(self.place(feeds))
        return {
            record["name"]: restored(self._fetched(result), record["dtype"])
            for record, result in zip(self.outputs, results, strict=True)
        }

    def place(self, feeds: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
        """The inputs as tensors where the kernels run, in the order of ``inputs``.

        Raises:
            ArtifactError: as :meth:`run`.
        """
        written = set() if self._on_gpu else self._written  # to a GPU all is copied
        return [
            self._placed(array.copy() if record["name"] in written else array)
            for record, array in zip(self.inputs, check_feeds(self.inputs, feeds), strict=True)
        ]

    def invoke(self, given: Sequence[Any]) -> Sequence[Any]:
        """The outputs for tensors from :meth:`place`, or for outputs of an earlier call, as tensors.

        Outputs in ``in_place`` are tensors of ``given``, changed: no other input may share their memory.
        On a GPU they may not be finished when this returns: work is queued on the current stream.

        Raises:
            ArtifactError: as :func:`check_tensors`, or the GPU's memory is full; dtypes and shapes are
                checked by TVM.
        """
        check_tensors(self._ffi, self.inputs, self._written, given, self._vector)
        try:
            results: Sequence[Any] = self._main(*given, *self._parameters)
        except RuntimeError as error:
            _refuse_full_memory(error, "the results and what is between need more")
            raise
        return results

    def record(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Recording:
        """The call for inputs of these sizes as one CUDA graph; it is run with these inputs first.

        Raises:
            ArtifactError: as :meth:`run`; or the artifact is for no GPU, or reads sizes from data.
        """
        if not self._on_gpu:
            raise ArtifactError("a CUDA graph is recorded on a GPU, and this artifact is for a CPU")
        return Recording(self, feeds)

    def _holding(self, held: list[Any]) -> Callable[[Sequence[Any]], Sequence[Any]]:
        """:meth:`invoke` that adds all memory it takes to ``held``, so that no later call gets it."""
        name = "vm.builtin.alloc_storage"
        allocate = self._ffi.get_global_func(name)

        def allocate_and_hold(*arguments: Any) -> Any:
            held.append(allocate(*arguments))
            return held[-1]

        self._ffi.register_global_func(name, allocate_and_hold, override=True)
        try:
            main = self._started()
        finally:
            self._ffi.register_global_func(name, allocate, override=True)
        return lambda given: main(*given, *self._parameters)

    def _placed(self, array: npt.NDArray[Any]) -> Any:
        host = _in_order(array)
        if not self._on_gpu:
            return self._ffi.from_dlpack(host)
        try:
            tensor = _empty(self._ffi, host.shape, host.dtype.name)
        except RuntimeError as error:
            _refuse_full_memory(error, f"an input takes {host.nbytes} bytes")
            raise
        self._upload(host, tensor)
        return tensor

    def _upload(self, host: npt.NDArray[Any], tensor: Any) -> None:
        copy = self._ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        copy(tensor, ctypes.c_void_p(host.ctypes.data), host.nbytes)

    def _fetched(self, tensor: Any) -> npt.NDArray[Any]:
        if not self._on_gpu:
            return np.from_dlpack(tensor)
        array = np.empty(tuple(tensor.shape), np.dtype(str(tensor.dtype)))
        copy = self._ffi.get_global_func("runtime.TVMTensorCopyToBytes")
        copy(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array


class Recording:
    """A call as a CUDA graph: starting it costs the host one launch, however many kernels there are.

    It has memory of its own: ``given`` (the inputs, in the order of the model's), ``results`` (the outputs,
    which every :meth:`replay` overwrites) and all between. Sizes are those it was recorded with. An output
    that the model writes in place is the tensor in ``given``: a cache goes from one replay to the next.
    """

    def __init__(self, model: Model, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        self._model = model
        self._cudart = _cuda_runtime(Path())
        self._graph = ctypes.c_void_p()
        self.given = model.place(feeds)
        self._held: list[Any] = []
        run = model._holding(self._held)
        try:
            run(self.given)  # loads the kernels, which no recording may do
        except RuntimeError as error:
            _refuse_full_memory(error, "the results and what is between need more")
            raise
        self._held.clear()
        self._check(self._cudart.cudaDeviceSynchronize(), "running the model")
        self.results = self._recorded(run)

    def __call__(self, **feeds: npt.ArrayLike) -> dict[str, npt.NDArray[Any]]:
        """:meth:`write` the inputs, replay, read the outputs.

        Raises:
            ArtifactError: a name, dtype or shape is not what was recorded.
        """
        self.write({name: np.asarray(value) for name, value in feeds.items()})
        self.replay()
        return {
            record["name"]: restored(self._model._fetched(result), record["dtype"])
            for record, result in zip(self._model.outputs, self.results, strict=True)
        }

    def write(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        """Copy arrays over the inputs. Those that the model writes in place may be left out: they stay.

        Raises:
            ArtifactError: a name, dtype or shape is not what was recorded.
        """
        kept = self._model._written - feeds.keys()
        pairs = zip(self._model.inputs, self.given, strict=True)
        places = [(record, tensor) for record, tensor in pairs if record["name"] not in kept]
        arrays = check_feeds([record for record, _ in places], feeds)
        for (record, tensor), array in zip(places, arrays, strict=True):
            if array.shape != tuple(tensor.shape):
                raise ArtifactError(
                    f"input {record['name']!r} is {list(array.shape)}, and the call was recorded for"
                    f" {list(tensor.shape)}: record another"
                )
        for (_, tensor), array in zip(places, arrays, strict=True):
            self._model._upload(_in_order(array), tensor)

    def replay(self) -> None:
        """Queue the call on the current stream."""
        ffi = self._model._ffi
        stream = ctypes.c_void_p(ffi.get_raw_stream(ffi.device("cuda", 0)))
        self._check(self._cudart.cudaGraphLaunch(self._graph, stream), "launching the graph")

    def _recorded(self, run: Callable[[Sequence[Any]], Sequence[Any]]) -> Sequence[Any]:
        ffi, cudart = self._model._ffi, self._cudart
        stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(cudart.cudaStreamCreateWithFlags(ctypes.byref(stream), 1), "making a stream")
        try:
            # Relaxed: only work that is queued is recorded, memory may be taken meanwhile.
            self._check(cudart.cudaStreamBeginCapture(stream, 2), "starting to record")
            try:
                with ffi.use_raw_stream(ffi.device("cuda", 0), stream.value):
                    results = run(self.given)
            except Exception as error:
                cudart.cudaStreamEndCapture(stream, ctypes.byref(graph))
                raise ArtifactError(
                    "the call cannot be recorded: it waits for the GPU, as a model does whose sizes"
                    f" depend on data. CUDA says: {error}"
                ) from error
            status = cudart.cudaStreamEndCapture(stream, ctypes.byref(graph))
            self._check(status, "recording the call")
            flags = ctypes.c_ulonglong(0)
            status = cudart.cudaGraphInstantiate(ctypes.byref(self._graph), graph, flags)
            cudart.cudaGraphDestroy(graph)
            self._check(status, "making the graph")
        finally:
            cudart.cudaStreamDestroy(stream)
        return results

    def _check(self, status: int, what: str) -> None:
        if status:
            raise ArtifactError(f"{what} failed: CUDA error {status}")

    def __del__(self) -> None:
        if self._graph:
            self._cudart.cudaGraphExecDestroy(self._graph)


def set_threads(count: int) -> None:
    """Let kernels use ``count`` threads, the caller's included, in the whole process and from now on.

    More than 256 are as 256. Threads are not bound to cores.

    Raises:
        ArtifactError: ``count`` is below 1.
    """
    if count < 1:
        raise ArtifactError(f"threads must be at least 1, got {count}")
    _threads[:] = [count]
    for library in _libraries.values():
        library.netlathe_set_threads(count)


def start_threads(count: int) -> None:
    """:func:`set_threads`, unless the number was set before."""
    if not _threads:
        set_threads(count)


# -- inputs ----------------------------------------------------------------------------------------


def check_feeds(
    inputs: list[dict[str, Any]], feeds: Mapping[str, npt.NDArray[Any]]
) -> list[npt.NDArray[Any]]:
    """The feeds in the order of ``inputs``, as they lie in memory.

    Raises:
        ArtifactError: with everything that is wrong about them.
    """
    problems: list[str] = []
    known = {record["name"] for record in inputs}
    problems += [f"there is no input named {name!r}" for name in feeds if name not in known]
    problems += [f"input {name!r} is missing" for name in known if name not in feeds]
    sizes: dict[str, tuple[int, int, str]] = {}  # dim -> size, and the axis and input that say so
    arrays: list[npt.NDArray[Any]] = []
    later: list[tuple[int, str, str, int]] = []
    for record in inputs:
        name = record["name"]
        if name not in feeds:
            continue
        array = _stored(np.asarray(feeds[name]), record)
        if array is None:
            problems.append(f"input {name!r} is {feeds[name].dtype}, not {record['dtype']}")
            continue
        shape: list[int | str] = record["shape"]
        if array.ndim != len(shape):
            problems.append(f"input {name!r} has {array.ndim} dims, not {len(shape)}: {shape}")
            continue
        for axis, (size, wanted) in enumerate(zip(array.shape, shape, strict=True)):
            if isinstance(wanted, int):
                if size != wanted:
                    problems.append(f"{_axis(axis, name)} is {size}, not {wanted}")
            elif not wanted.isidentifier():
                later.append((axis, name, wanted, size))
            elif sizes.setdefault(wanted, (size, axis, name))[0] != size:
                before, first, other = sizes[wanted]
                problems.append(
                    f"{_axis(axis, name)} is {size}, but {_axis(first, other)} is {before}:"
                    f" both are {wanted!r}"
                )
        arrays.append(array)
    for axis, name, wanted, size in later:
        value = _evaluate(wanted, {dim: found[0] for dim, found in sizes.items()})
        if value is not None and value != size:
            problems.append(f"{_axis(axis, name)} is {size}, not {wanted} = {value}")
    if problems:
        raise ArtifactError("; ".join(problems) + f". The inputs are {describe(inputs)}")
    return arrays


def check_tensors(
    ffi: Any,
    inputs: Sequence[Mapping[str, Any]],
    written: Set[str],
    given: Sequence[Any],
    vector: int,
) -> None:
    """Return if kernels may take ``given``, in the order of ``inputs``, as they lie in memory.

    ``written`` are the names of inputs that are written in place, ``vector`` the most bytes that a kernel
    loads at once. A tensor of fewer bytes is loaded by less.

    Raises:
        ArtifactError: there are more or fewer tensors; one has gaps, or begins where no such load may; or
            one that is written shares memory with another.
    """
    if len(given) != len(inputs):
        raise ArtifactError(
            f"{len(given)} tensors were given for {len(inputs)} inputs: {describe(inputs)}"
        )
    extents: list[tuple[int, int, str]] = []  # address, the address behind it, name
    for record, item in zip(inputs, given, strict=True):
        # Only looked at: tvm_ffi takes torch's current stream from the tensors that it is handed itself.
        tensor = item if isinstance(item, ffi.Tensor) else ffi.from_dlpack(item)
        size = tensor.numel() * _itemsize(record["stored"])
        if not size:
            continue
        name, start = record["name"], tensor.data_ptr()
        if not tensor.is_contiguous():
            raise ArtifactError(
                f"input {name!r} is not contiguous: its shape is {list(tensor.shape)} and its strides"
                f" are {list(tensor.strides)}. Give a copy, in torch: .contiguous()"
            )
        aligned = min(vector, 1 << size.bit_length() - 1)
        if start % aligned:
            raise ArtifactError(
                f"input {name!r} begins {start % aligned} bytes behind a multiple of {aligned}, and"
                f" kernels load {aligned} bytes at once, as where it is a view of a part of another"
                " tensor. Give a copy, in torch: .clone()"
            )
        extents.append((start, start + size, name))
    if written:
        _check_apart(extents, written)


def _check_apart(extents: list[tuple[int, int, str]], written: Set[str]) -> None:
    """Return if no tensor of ``written`` overlaps another; ``extents`` are addresses and a name of each."""
    extents.sort()
    farthest, other = 0, ""  # of those that begin before
    for start, end, name in extents:
        if start < farthest and (name in written or other in written):
            changed, kept = (name, other) if name in written else (other, name)
            raise ArtifactError(
                f"input {changed!r} is written in place and shares memory with input {kept!r}."
                " Give a copy of one of them, in torch: .clone()"
            )
        if end > farthest:
            farthest, other = end, name


_itemsize = functools.cache(lambda stored: np.dtype(stored).itemsize)


def _axis(axis: int, name: str) -> str:
    return f"axis {axis} of input {name!r}"


def describe(inputs: Sequence[Mapping[str, Any]]) -> str:
    """``input_ids: int64[batch,sequence], ...``."""
    return ", ".join(
        f"{r['name']}: {r['dtype']}[{','.join(str(d) for d in r['shape'])}]" for r in inputs
    )


def _stored(array: npt.NDArray[Any], record: dict[str, Any]) -> npt.NDArray[Any] | None:
    """The array in its type in memory; None if it is of another type."""
    if _name(array.dtype) == record["dtype"]:
        if record["dtype"] == record["stored"]:
            return array
        if array.dtype.itemsize == np.dtype(record["stored"]).itemsize:
            if record["dtype"].startswith(("int", "uint")):
                return array.astype(record["stored"])
            same: npt.NDArray[Any] = np.require(array, requirements="C").view(record["stored"])
            return same
    # Without the type's own package, bits may be passed.
    return array if _name(array.dtype) == record["stored"] != record["dtype"] else None


_name = functools.cache(lambda dtype: dtype.name)  # which numpy composes anew each time


def restored(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """An output in its own type, where this process has it; else its bits."""
    if _name(array.dtype) == dtype:
        return array
    if importlib.util.find_spec("ml_dtypes") is None:
        return array
    import ml_dtypes

    own = np.dtype(getattr(ml_dtypes, dtype))
    return array.astype(own) if dtype.startswith(("int", "uint")) else array.view(own)


def _in_order(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array contiguous and writable (DLPack cannot say otherwise), its numbers as this CPU has them."""
    if not array.size:  # numpy's strides of nothing are not those that kernels check
        sizes = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        strides = [size * array.itemsize for size in sizes]
        return np.lib.stride_tricks.as_strided(
            np.empty(1, array.dtype.newbyteorder("=")), array.shape, strides
        )
    if array.flags.carray and array.dtype.isnative:
        return array
    return np.require(array, array.dtype.newbyteorder("="), ["C", "A", "W"])


_OPERATORS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}


def _evaluate(text: str, sizes: Mapping[str, int]) -> int | None:
    """A dim such as ``past + sequence``; None where it has more to it than arithmetic on names."""

    def value(node: ast.expr) -> int | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return sizes.get(node.id)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = value(node.left), value(node.right)
            if left is None or right is None or (right == 0 and isinstance(node.op, ast.Div)):
                return None
            return _OPERATORS[type(node.op)](left, right)
        return None

    try:
        return value(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return None


# -- files -----------------------------------------------------------------------------------------


def check_files(folder: str | os.PathLike[str]) -> None:
    """Compare every byte of an artifact with what was written; :func:`load` reads no constants for that.

    Raises:
        ArtifactError: a file is missing, cut off or changed.
    """
    path = Path(folder)
    meta = _read_meta(path)
    for name, digest in meta["sha256"].items():
        if _digest(path / name) != digest:
            raise ArtifactError(f"{path / name} is damaged: it is not what was written")


def _read_meta(folder: Path) -> dict[str, Any]:
    for name in (META_FILE, LIBRARY_FILE, PARAMETERS_FILE):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} is no artifact of the TVM backend: it has no {name}")
    try:
        meta = json.loads((folder / META_FILE).read_text("utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{folder / META_FILE} is damaged: {error}") from error
    if not isinstance(meta, dict) or "format" not in meta:
        raise ArtifactError(f"{folder / META_FILE} is damaged: it describes no artifact")
    if meta["format"] != FORMAT:
        raise ArtifactError(
            f"{folder} has format {meta['format']}, and this loader reads format {FORMAT}:"
            " use the runtime.py that lies in the artifact"
        )
    if lost := sorted(_KEYS - meta.keys()):
        raise ArtifactError(f"{folder / META_FILE} is damaged: it has no {', '.join(lost)}")
    _check_sizes(folder, meta)
    return meta


def _check_sizes(folder: Path, meta: Mapping[str, Any]) -> None:
    path = folder / PARAMETERS_FILE
    size = path.stat().st_size
    if size < meta["parameter_bytes"]:
        raise ArtifactError(f"{path} is cut off: {size} of {meta['parameter_bytes']} bytes")
    if size > meta["parameter_bytes"]:
        raise ArtifactError(f"{path} has {size} bytes, not {meta['parameter_bytes']}")
    for record in meta["parameters"]:
        count = math.prod(record["shape"]) * np.dtype(record["dtype"]).itemsize
        end = record["offset"] + record["bytes"]
        if count != record["bytes"] or not 0 <= record["offset"] <= end <= size:
            raise ArtifactError(
                f"{folder / META_FILE} is damaged: constant {record['name']!r} does not fit its place"
            )


def _check_library(folder: Path, meta: Mapping[str, Any]) -> None:
    """A library is small, and code that was changed may do anything."""
    if _digest(folder / LIBRARY_FILE) != meta["sha256"][LIBRARY_FILE]:
        raise ArtifactError(
            f"{folder / LIBRARY_FILE} is damaged or cut off: it is not what was written"
        )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_versions(meta: Mapping[str, Any]) -> None:
    """The library speaks to the runtime in the binary interface of the versions it was built with."""
    problems = []
    for package in ("apache-tvm", "apache-tvm-ffi"):
        built = meta["versions"][package]
        try:
            here = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a runtime library alone has no version to ask for
        if _release(here) != _release(built):
            problems.append(f"it was built with {package} {built}, and {here} is installed")
    if problems:
        raise ArtifactError(f"another version: {'; '.join(problems)}. Install it, or build anew")


def _release(version: str) -> str:
    return version.partition(".post")[0]


def _check_cpu(meta: Mapping[str, Any]) -> None:
    if platform.machine() != meta["architecture"]:
        raise ArtifactError(
            f"the artifact is for {meta['architecture']}, and this is {platform.machine()}"
        )
    if missing := sorted(set(meta["cpu_features"]) - cpu_features()):
        lesser = (
            "features='avx2'" if meta["architecture"] == "x86_64" else "a lesser core as target"
        )
        raise ArtifactError(
            f"this CPU lacks {', '.join(missing)}: the artifact was built for"
            f" features={meta['features']!r}; build it with {lesser}"
        )


def _runtime(folder: Path | None = None) -> Any:
    """The module ``tvm_ffi``, once libtvm_runtime.so, whose functions libraries call, is loaded."""
    try:
        import tvm_ffi  # the runtime needs its library
    except ModuleNotFoundError:
        raise ArtifactError(
            "tvm_ffi, which runs artifacts, was not found: install apache-tvm-ffi"
        ) from None
    if _loaded:
        return tvm_ffi
    for path in _runtime_candidates(folder):
        if path.is_file():
            _loaded.append(ctypes.CDLL(os.fspath(path), mode=ctypes.RTLD_GLOBAL))
            return tvm_ffi
    raise ArtifactError(
        f"{_RUNTIME} was not found: install apache-tvm, or point NETLATHE_TVM_RUNTIME at the file"
    )


def _runtime_candidates(folder: Path | None) -> list[Path]:
    found = []
    if named := os.environ.get("NETLATHE_TVM_RUNTIME"):
        found.append(Path(named))
    if folder is not None:
        found.append(folder / _RUNTIME)
    spec = importlib.util.find_spec("tvm")
    if spec is not None and spec.origin is not None:
        found.append(Path(spec.origin).parent / "lib" / _RUNTIME)
    return found


# -- GPUs ------------------------------------------------------------------------------------------


def gpu_lack(archs: Sequence[str]) -> str:
    """Why no kernel for one of ``archs`` (``sm_80``, ``sm_90a``, ...) runs here; empty if it does."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return "the NVIDIA driver finds no GPU"
    for number, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    here = f"sm_{major.value}{minor.value}"
    # Machine code runs on its own major version, at its own minor or a later one; `a` on its own alone.
    for arch in archs:
        if here == arch.rstrip("a"):
            return ""
        if not arch.endswith("a") and here[:-1] == arch[:-1] and here[-1] >= arch[-1]:
            return ""
    return f"the code is for {', '.join(archs)}, and this GPU is {here}: build it for that one"


def check_gpu(archs: Sequence[str]) -> None:
    """Return if the first GPU runs code for one of ``archs``.

    Raises:
        ArtifactError: there is none, or it is of another architecture.
    """
    if lack := gpu_lack(archs):
        raise ArtifactError(lack)


def _cuda_runtime(folder: Path) -> ctypes.CDLL:
    """Load TVM's CUDA part, which registers the device; CUDA's runtime, which it is linked to."""
    if len(_loaded) > 1:
        return _loaded[1]
    for path in _runtime_candidates(folder):
        part = path.with_name("libtvm_runtime_cuda.so")
        if not part.is_file():
            continue
        for cudart in _cudart_candidates(folder):
            try:
                _loaded.append(ctypes.CDLL(cudart, mode=ctypes.RTLD_GLOBAL))
                break
            except OSError:
                continue
        else:
            raise ArtifactError("libcudart.so.13 was not found: install nvidia-cuda-runtime 13")
        _loaded.append(ctypes.CDLL(os.fspath(part), mode=ctypes.RTLD_GLOBAL))
        return _loaded[1]
    raise ArtifactError(f"libtvm_runtime_cuda.so was not found beside {_RUNTIME}")


def _cudart_candidates(folder: Path) -> list[str]:
    name = "libcudart.so.13"
    found = [os.fspath(folder / name), name, f"/usr/local/cuda/lib64/{name}"]
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        found.append(os.path.join(place, "cu13", "lib", name))
    return found


def _empty(ffi: Any, shape: Sequence[int], dtype: str) -> Any:
    allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    return allocate(ffi.Shape(shape), ffi.dtype(dtype), ffi.device("cuda", 0), None)


def _check_room(cudart: Any, wanted: int) -> None:
    free, total = _room(cudart)
    if wanted > free:
        raise ArtifactError(
            f"the constants take {wanted} bytes of the GPU's memory, and {free} of {total} are free"
        )


def _room(cudart: Any) -> tuple[int, int]:
    """Bytes of the GPU's memory: free ones, and all."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if status := cudart.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
        raise ArtifactError(f"CUDA's runtime does not start (error {status})")
    return free.value, total.value


def _refuse_full_memory(error: RuntimeError, why: str) -> None:
    """Raise an ArtifactError if ``error`` is TVM's of an allocation that did not fit the GPU's memory."""
    if "cudaErrorMemoryAllocation" in str(error):
        free, total = _room(_cuda_runtime(Path()))
        raise ArtifactError(
            f"the GPU's memory is full: {why}, and {free} of {total} bytes are free"
        ) from error


def _parameters(folder: Path, meta: Mapping[str, Any]) -> list[npt.NDArray[Any]]:
    """The constants, mapped from the file: read when a kernel needs them, by huge pages if they are."""
    if not meta["parameters"]:
        return []
    # Private and writable: DLPack refuses read-only memory, and nobody writes.
    access = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
    with open(folder / PARAMETERS_FILE, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, **access)
    with contextlib.suppress(OSError):  # a Linux without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(mapped, np.uint8)
    arrays = []
    for record in meta["parameters"]:
        start, count = record["offset"], record["bytes"]
        array = data[start : start + count].view(np.dtype(record["dtype"]))
        arrays.append(array.reshape(record["shape"]))
    return arrays
