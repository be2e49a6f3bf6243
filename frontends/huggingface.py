"""Captures a local Hugging Face directory, with weights that stay in its safetensors files.

The graph computes in float32 whatever the checkpoint's dtype: a bfloat16 or float16 weight is bound
as a lazy cast of the mapped file (exact, not held after use); the `convert` pass narrows again.
Nothing is unpickled and no code from the directory is run.

    HuggingFaceDirectory(cache=True).capture("models/my-llama")
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from netlathe.diagnostics import CaptureError, Diagnostic, InputError
from netlathe.frontends.checkpoint import (
    Files,
    OthersMaps,
    Places,
    StoredTensor,
    read_checkpoint,
)
from netlathe.frontends.compare import Original
from netlathe.frontends.finish import finish
from netlathe.frontends.finite import check_finite
from netlathe.frontends.hf_tasks import INNER, Task, make_task
from netlathe.frontends.hf_text import tokenizer, travelling_files
from netlathe.frontends.torch_export import Exported, export, listening
from netlathe.ir import weights
from netlathe.pipeline.interfaces import Captured, Frontend
from netlathe.pipeline.ledger import Entry


@dataclass(frozen=True)
class _Implementation:
    """Which of the library's equivalent implementations to build with; None: as configured."""

    attention: str | None = None
    experts: str | None = None

    def __str__(self) -> str:
        parts = []
        if self.attention:
            parts.append(f"{self.attention} attention")
        if self.experts:
            parts.append(f"{self.experts} experts")
        return " and ".join(parts) or "the configured implementation"


# Tried in this order until one exports: fused attention and grouped experts have no ONNX form in some
# families (with transformers 5.24, Mixtral needs batched_mm experts).
_AS_CONFIGURED = _Implementation()
_DENSE = (_Implementation(attention="eager"),)
_MIXTURE = (
    _Implementation(experts="batched_mm"),
    _Implementation(attention="eager", experts="batched_mm"),
)


# Weights that nothing here reads.
READ_BYTES = 512 << 20  # of a mapped checkpoint that may stay in memory after they were read
_OTHER_WEIGHTS = frozenset(".bin .ckpt .gguf .h5 .msgpack .onnx .ot .pkl .pt .pth .tflite".split())


class HuggingFaceDirectory(Frontend):
    """A directory with ``config.json`` and safetensors weights.

    ``cache`` captures a causal language model with its key-value cache: inputs
    ``past_key_values.N.key|value`` [batch, kv_heads, past_sequence, head_dim] and an
    ``attention_mask`` [batch, past_sequence + sequence], outputs ``logits`` and
    ``present.N.key|value``. A sentence-transformers directory gives ``sentence_embedding``, other
    encoders ``last_hidden_state``, everything with a head ``logits``.
    """

    name: ClassVar[str] = "huggingface"

    def __init__(self, cache: bool = False) -> None:
        self.cache = cache

    @classmethod
    def accepts(cls, source: Any) -> bool:
        """A directory; one without ``config.json`` is refused with a message by :meth:`capture`."""
        return isinstance(source, str | Path) and Path(source).is_dir()

    def capture(self, source: str | Path) -> Captured:
        """Capture the model in the directory ``source``.

        Raises:
            InputError: config or weights are missing, damaged, pickled, of the wrong shape, not
                finite, or of an architecture that is not known.
            CaptureError: the model cannot be exported, or the graph is not the same function.
        """
        folder = Path(source)
        config, model_class = _read_config(folder)
        checkpoint = read_checkpoint(folder)
        check_finite(((t.name, t.array()) for t in checkpoint.values()), str(folder))
        first: CaptureError | None = None
        mixture = hasattr(config, "num_local_experts") or hasattr(config, "num_experts")
        for implementation in (_AS_CONFIGURED, *(_MIXTURE if mixture else _DENSE)):
            try:
                captured = self._capture(folder, model_class, checkpoint, implementation)
            except CaptureError as error:
                if error.diagnostics[0].code not in ("torch.export", "torch.onnx"):
                    raise  # it was exported, and is wrong
                first = first or error
                continue
            if implementation != _AS_CONFIGURED and first is not None:
                reason = f"captured with {implementation}: {first.diagnostics[0].message}"
                captured.entries.insert(0, Entry(model_class.__name__, "applied", reason))
            return captured
        assert first is not None
        raise first

    def sources(self, source: str | Path) -> Mapping[str, Path]:
        """Every file in the directory but hidden ones, and the weights of other frameworks."""
        folder = Path(source)
        return {
            file.relative_to(folder).as_posix(): file
            for file in sorted(folder.rglob("*"))
            if file.is_file()
            and file.suffix not in _OTHER_WEIGHTS
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        }

    def recall(
        self,
        source: str | Path,
        model: ir.Model,
        dynamic: Mapping[str, int],
        facts: Mapping[str, Any],
    ) -> Captured:
        """The tokenizer and the files that travel are read anew."""
        folder = Path(source)
        inputs = [str(value.name) for value in model.graph.inputs]
        captured = super().recall(source, model, dynamic, facts)
        captured.files = travelling_files(folder)
        captured.tokenize = tokenizer(folder, facts["config"], inputs, facts["max_length"])
        return captured

    def _capture(
        self,
        folder: Path,
        model_class: type[Any],
        checkpoint: Mapping[str, StoredTensor],
        implementation: _Implementation,
    ) -> Captured:
        loaded = _load(folder, model_class, implementation, checkpoint)
        config: Any = loaded.model.config
        task = make_task(loaded.model, config, folder, cache=self.cache)
        what = f"{type(loaded.model).__name__} in {folder}"
        exported = export(task.module, (), task.kwargs, task.dynamic, what=what, inside=INNER)
        loaded.files.give_back()
        entries = [*exported.entries, *_bind_weights(exported.model, loaded, folder)]
        inputs = [str(v.name) for v in exported.model.graph.inputs]
        settings = config.to_dict()
        facts: dict[str, Any] = {
            "config": {key: settings.get(key) for key in ("pad_token_id", "eos_token_id")},
            "max_length": _max_length(folder, config),
        }
        captured = finish(
            exported.model,
            _original(exported, loaded, task),
            source=str(folder),
            frontend=self.name,
            dynamic=exported.dynamic,
            entries=entries,
            files=travelling_files(folder),
            tokenize=tokenizer(folder, facts["config"], inputs, facts["max_length"]),
        )
        captured.facts = facts
        return captured


# -- config ---------------------------------------------------------------------------------------


def _read_config(folder: Path) -> tuple[Any, type[Any]]:
    """The config and the class it names; never code from the folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(
            Diagnostic(
                "hf.config",
                "not a Hugging Face model directory: there is no config.json",
                at=str(folder),
                help=_instead(folder),
            )
        )
    try:
        raw = json.loads(file.read_text("utf-8"))
        kind = raw["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            Diagnostic(
                "hf.config",
                "cannot read the config: "
                + (str(error) if isinstance(error, ValueError) else "it names no model_type"),
                at=str(file),
            )
        ) from error
    names = raw.get("architectures") or []
    model_class = getattr(transformers, names[0], None) if names else None
    if names and model_class is None:
        near = difflib.get_close_matches(names[0], dir(transformers), n=3, cutoff=0.8)
        custom = "auto_map" in raw
        raise InputError(
            Diagnostic(
                "hf.architecture",
                f"unknown architecture {names[0]!r} (transformers {transformers.__version__})",
                at=str(file),
                notes=("the folder brings its own code, which is not run",) if custom else (),
                help=f"did you mean {' or '.join(near)}?"
                if near and not custom
                else "load the model yourself and capture it as a module with example inputs",
            )
        )
    try:
        with listening():
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # the library raises what its many configs raise
        reason = " ".join(str(error).split("\n\n")[0].split())  # without its advice for another use
        raise InputError(
            Diagnostic(
                "hf.config",
                f"transformers cannot read the config of model type {kind!r}: {reason}",
                at=str(file),
            )
        ) from error
    if model_class is None:
        known: Any = transformers.AutoModel._model_mapping
        model_class = known[type(config)]
    return config, model_class


def _instead(folder: Path) -> str:
    """A help line for a folder that is no model: the models in it, else what a model is."""
    inside = sorted(
        str(path)
        for path in folder.glob("*")
        if (path.suffix in (".onnx", ".pt2") and path.is_file()) or (path / "config.json").is_file()
    )
    if inside:
        return f"give {' or '.join(inside[:3])}"
    return "give a folder with config.json and safetensors, an .onnx file or a .pt2 file"


def _max_length(folder: Path, config: Any) -> int | None:
    """Tokens beyond which a text is cut: the sentence encoder's limit, else the config's."""
    file = folder / "sentence_bert_config.json"
    if file.is_file():
        limit = json.loads(file.read_text("utf-8")).get("max_seq_length")
        if limit:
            return int(limit)
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


# -- loading --------------------------------------------------------------------------------------


@dataclass
class _Loaded:
    """A float32 model, and the checkpoint's own values where they are of another dtype.

    ``stored`` has the checkpoint's value of every parameter and persistent buffer by name, and
    ``places`` where in the files each lies: nowhere, if the library changed it. Where the checkpoint
    is narrower, the model's parameters are placeholders of untouched, so unallocated, memory, and
    hold values only while their module runs inside :meth:`filled`.
    """

    model: nn.Module
    stored: Mapping[str, torch.Tensor]
    places: Mapping[str, Sequence[StoredTensor]]
    files: Files
    missing: frozenset[str]
    unexpected: Sequence[str]  # in the checkpoint, and no weight of the model
    narrow: bool

    @contextlib.contextmanager
    def filled(self) -> Iterator[None]:
        """Give each module its float32 parameters just while it runs."""
        if not self.narrow:
            yield
            self.files.give_back()
            return
        handles, read = [], 0
        for path, module in self.model.named_modules():
            own = {
                name: (parameter, parameter.data, self.stored[f"{path}.{name}" if path else name])
                for name, parameter in module.named_parameters(recurse=False)
            }
            if not own:
                continue

            def fill(_module: nn.Module, _inputs: Any, own: Any = own) -> None:
                for parameter, _, stored in own.values():
                    parameter.data = stored.to(torch.float32)

            def empty(_module: nn.Module, _inputs: Any, _output: Any, own: Any = own) -> None:
                nonlocal read
                for parameter, placeholder, stored in own.values():
                    parameter.data = placeholder
                    read += stored.nbytes
                if read > READ_BYTES:
                    read = 0
                    self.files.give_back()

            handles.append(module.register_forward_pre_hook(fill))
            handles.append(module.register_forward_hook(empty, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.files.give_back()


def _load(
    folder: Path,
    model_class: type[Any],
    implementation: _Implementation,
    checkpoint: Mapping[str, StoredTensor],
) -> _Loaded:
    """Load in the checkpoint's dtype (mapped, not copied) and give it a float32 shape.

    Raises:
        InputError: a weight has the wrong shape, or the library cannot load the model.
    """
    settings: dict[str, Any] = {}
    if implementation.attention:
        settings["attn_implementation"] = implementation.attention
    if implementation.experts:
        settings["experts_implementation"] = implementation.experts
    try:
        with listening():
            stored, info = model_class.from_pretrained(
                folder,
                dtype="auto",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **settings,
            )
    except Exception as error:  # the library raises what its many models raise
        raise InputError(
            Diagnostic(
                "hf.load",
                f"transformers cannot load the model: {type(error).__name__}: {error}",
                at=str(folder),
            )
        ) from error
    _check_shapes(info, folder)
    files = Files()
    places = _remap(stored, checkpoint, files)
    narrow = {p.dtype for p in stored.parameters()} - {torch.float32}
    if not narrow:
        model = stored
    else:
        with _float32_default(), no_init_weights():
            model = model_class._from_config(stored.config, dtype=torch.float32)
        own = dict(stored.named_buffers())
        persistent = stored.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in persistent:
                buffer.data = own[name].to(buffer.dtype)
    return _Loaded(
        model=model.eval(),
        stored=stored.state_dict(),
        places=places,
        files=files,
        missing=frozenset(info.get("missing_keys") or ()),
        unexpected=sorted(info.get("unexpected_keys") or ()),
        narrow=bool(narrow),
    )


def _remap(
    model: Any, checkpoint: Mapping[str, StoredTensor], files: Files
) -> dict[str, list[StoredTensor]]:
    """Let ``model`` read what is unchanged from ``files``; where every weight lies, by name.

    The library maps the files too, but keeps every page it has read. What the files have by name goes
    first: the others are told by bytes, and take of equal tensors those that are left.
    """
    found: dict[str, list[StoredTensor]] = {}
    first: dict[int, str] = {}  # tied weights are one object
    places = Places(checkpoint)
    others = OthersMaps({place.file for place in checkpoint.values()})
    prefix = str(getattr(model, "base_model_prefix", ""))
    weights = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }

    def names(name: str) -> tuple[str, ...]:
        return name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"

    # the dict of the state itself would hold on to all that was mapped
    for name in sorted(
        model.state_dict(), key=lambda name: checkpoint.keys().isdisjoint(names(name))
    ):
        weight = weights[name]
        if (tied := first.setdefault(id(weight), name)) != name:
            found[name] = found[tied]
            continue
        array = _numpy(weight)
        found[name] = places.find(names(name), ir.DataType.from_numpy(array.dtype), array)
        if len(found[name]) == 1:
            mapped = _torch(files.array(found[name][0]))
            weight.data = mapped.reshape(weight.shape)
            others.give_back(array)
    return found


@contextlib.contextmanager
def _float32_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _check_shapes(info: Mapping[str, Any], folder: Path) -> None:
    mismatched: Iterable[Any] = info.get("mismatched_keys") or ()
    wrong = [
        Diagnostic(
            "hf.shape",
            f"weight {name!r} is {list(found)} in the checkpoint, the config asks for"
            f" {list(wanted)}",
            at=str(folder),
            help="config.json and the weights are not of the same model",
        )
        for name, found, wanted in sorted(mismatched)
    ]
    if wrong:
        raise InputError(wrong)


# -- binding --------------------------------------------------------------------------------------


def _bind_weights(model: ir.Model, loaded: _Loaded, folder: Path) -> list[Entry]:
    """Point every initializer that is a checkpoint weight into its file.

    Raises:
        InputError: the graph uses weights that the checkpoint does not have.
    """
    common_passes.RemoveUnusedNodesPass()(model)  # a head nobody asked for may lack its weights
    graph = model.graph
    used = [name for name in graph.initializers if name in loaded.missing]
    if used:
        raise InputError(
            [
                Diagnostic(
                    "hf.missing",
                    f"weight {name!r}, {list(graph.initializers[name].shape or ())}, is not in the"
                    " checkpoint",
                    at=str(folder),
                    help="config.json asks for a model that these weights are not, or a file of"
                    " the checkpoint is missing",
                )
                for name in used
            ]
        )
    held: list[str] = []
    cast = total = 0
    for name, value in graph.initializers.items():
        stored = loaded.stored.get(name)
        if stored is None:
            continue  # a constant of the code, not of the checkpoint
        total += 1
        base = _mapped(name, tuple(stored.shape), loaded.places[name])
        if base is None:
            held.append(name)
            base = _tensor(stored, name)
        if stored.dtype == torch.float32:
            value.const_value = base
        elif value.dtype == ir.DataType.FLOAT:
            value.const_value = weights.converted(base, ir.DataType.FLOAT, name)
            cast += 1
    reason = f"{total - len(held)} of {total} weights stay in their files"
    if held:
        reason += f"; in memory, because the library changed them: {', '.join(held[:4])}"
        reason += f" and {len(held) - 4} more" if len(held) > 4 else ""
    entries = [Entry("weights", "applied", reason)]
    if loaded.unexpected:
        architecture = type(loaded.model).__name__
        reason = (
            f"{len(loaded.unexpected)} tensors of the checkpoint are no weights of {architecture}"
        )
        detail = {"tensors": list(loaded.unexpected)}
        entries.append(Entry("weights", "skipped", reason, detail=detail))
    if cast:
        dtype = str(next(iter(loaded.model.parameters())).dtype).removeprefix("torch.")
        reason = f"{cast} weights of a narrower checkpoint are cast to {dtype} when used"
        entries.append(Entry("weights", "applied", reason))
    return entries


def _mapped(
    name: str, shape: Sequence[int], places: Sequence[StoredTensor]
) -> ir.TensorProtocol | None:
    """The weight as it lies in the files; None where the files hold other bytes."""
    if len(places) == 1:
        return places[0].tensor(name, shape)
    return weights.joined([p.tensor(p.name) for p in places], shape, name) if places else None


def _numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor's memory as an array, bfloat16 included."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _torch(array: npt.NDArray[Any]) -> torch.Tensor:
    """The reverse of :func:`_numpy`."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _tensor(tensor: torch.Tensor, name: str) -> ir.TensorProtocol:
    return ir.tensor(_numpy(tensor), name=name)


def _original(exported: Exported, loaded: _Loaded, task: Task) -> Original:
    """The exported model's callables, run with the checkpoint's values in place."""

    def filled(run: Any) -> Any:
        def call(feeds: Any) -> Any:
            with loaded.filled():
                return run(feeds)

        return call

    def intermediates(feeds: Any) -> Any:
        if loaded.narrow:  # the interpreter calls no modules: all weights at once, on failure only
            with torch.no_grad():
                for name, parameter in loaded.model.named_parameters():
                    parameter.copy_(loaded.stored[name])
        return exported.intermediates(feeds)

    return Original(
        run=filled(exported.run),
        moved=filled(exported.moved),
        intermediates=intermediates,
        bounds=exported.bounds,
        sizes=task.sizes,
    )
