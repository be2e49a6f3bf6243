"""Where a node comes from: the module path and source line in the user's model, and the pass that made it."""

from __future__ import annotations

import fnmatch
import re

import onnx_ir as ir

MODULE = "netlathe.module"
SOURCE = "netlathe.source"
CREATED_BY = "netlathe.created_by"
# The constant that this node widens is stored so on purpose: do not fold it.
STORED = "netlathe.stored"

# An ONNX file exported by TorchScript names nodes like "/encoder/layer.0/attention/self/MatMul".
_SCOPED_NAME = re.compile(r"^/(?P<path>.+)/[^/]+$")


def module_path(thing: ir.Node | ir.Value) -> str:
    """The dotted module path of a node, or of the node that makes (else first reads) a value.

    An empty string where nothing is known.
    """
    if isinstance(thing, ir.Value):
        node = thing.producer() or next(iter(thing.consumers()), None)
        return module_path(node) if node is not None else ""
    if known := thing.metadata_props.get(MODULE):
        return known
    if scoped := _SCOPED_NAME.match(thing.name or ""):
        return scoped["path"].replace("/", ".")
    return ""


def matches(path: str, pattern: str) -> bool:
    """Whether ``pattern`` names ``path`` or whole parts of it that follow each other.

    ``layers.1`` is in ``model.layers.1.mlp`` and not in ``model.layers.10``; ``*`` and ``?`` are wildcards.
    """
    whole = fnmatch.fnmatchcase(path, pattern)
    return whole or fnmatch.fnmatchcase(f".{path}.", f"*.{pattern}.*")


def location(node: ir.Node) -> str:
    """Module path, source line and creating pass, as a diagnostic's ``where`` shows them."""
    path = module_path(node)
    if source := node.metadata_props.get(SOURCE):
        path = f"{path} ({source})" if path else source
    if maker := node.metadata_props.get(CREATED_BY):
        path = f"{path}   created by {maker}".strip()
    return path


def mark(
    node: ir.Node, *, created_by: str = "", module: str = "", like: ir.Node | None = None
) -> ir.Node:
    """Write provenance into ``node`` and return it; ``like`` lends its module path and source."""
    if like is not None:
        for key in (MODULE, SOURCE):
            if value := like.metadata_props.get(key):
                node.metadata_props[key] = value
        if MODULE not in node.metadata_props and (path := module_path(like)):
            node.metadata_props[MODULE] = path
    if module:
        node.metadata_props[MODULE] = module
    if created_by:
        node.metadata_props[CREATED_BY] = created_by
    return node
