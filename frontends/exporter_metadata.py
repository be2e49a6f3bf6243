"""Condenses what torch's exporter writes about every node into a module path and a source line."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, MutableMapping
from pathlib import PurePath

import onnx_ir as ir

MODULE = "netlathe.module"
SOURCE = "netlathe.source"

# What torch's passes write where a node comes from no module.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def condense(model: ir.Model, strip: Callable[[str], str] = str) -> None:
    """Write `netlathe.module` and `netlathe.source` where known, and drop the exporter's metadata.

    ``strip`` is applied to every module path. Metadata that is not the exporter's stays.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        props = node.metadata_props
        module = strip(_module_path(props.get("pkg.torch.onnx.name_scopes", "")))
        source = _source_line(props.get("pkg.torch.onnx.stack_trace", ""))
        if module:
            props.setdefault(MODULE, module)
        if source:
            props.setdefault(SOURCE, source)
        _drop(props)
        for value in node.outputs:
            _drop(value.metadata_props)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _drop(value.metadata_props)
    _drop(model.graph.metadata_props)
    _drop(model.metadata_props)


def _module_path(scopes: str) -> str:
    """The innermost module of a list such as "['', 'model', 'model.layers.0', 'add']"."""
    if not scopes:
        return ""
    try:
        names = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):  # not written by the exporter we know: no path then
        return ""
    modules = names[:-1] if isinstance(names, list) else []  # the last entry is the operation
    return str(modules[-1]) if modules and modules[-1] != _NO_MODULE else ""


def _source_line(trace: str) -> str:
    """The innermost frame outside torch itself, as "modeling_x.py:88"."""
    frames = [(PurePath(file), line) for file, line in _FRAME.findall(trace)]
    own = [(file, line) for file, line in frames if "torch" not in file.parts]
    return f"{own[-1][0].name}:{own[-1][1]}" if own else ""


def _drop(props: MutableMapping[str, str]) -> None:
    for key in [k for k in props if k.startswith("pkg.torch.") or k in ("namespace",)]:
        del props[key]
