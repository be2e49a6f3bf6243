"""NetLathe: graph passes that make neural networks smaller, checked after every pass.

    captured = netlathe.capture("path/to/model")          # ONNX file, Hugging Face directory, nn.Module
    compiled = netlathe.compile(captured, 'cleanup, quantize(weights="int8")')
    compiled.save("out/model")

What is listed here is the public API; names are imported when they are used, so that ``import
netlathe`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from netlathe.analysis.cost import Cost, cost
    from netlathe.api import capture, compile, plan, user_cache_dir
    from netlathe.diagnostics import (
        CaptureError,
        Diagnostic,
        GateError,
        InputError,
        LowerError,
        MissingExtraError,
        NetLatheError,
        OptionError,
        PassError,
        VerifyError,
    )
    from netlathe.pipeline.interfaces import Artifact, Backend, Captured, Frontend, Target
    from netlathe.pipeline.ledger import Entry
    from netlathe.pipeline.loss import Loss
    from netlathe.pipeline.pass_ import (
        ChoosingPass,
        Context,
        Equivalent,
        Exact,
        Lossy,
        Pass,
        Reference,
        Result,
        option,
        options,
    )
    from netlathe.pipeline.run import Compiled
    from netlathe.pipeline.step import Step
    from netlathe.pipeline.verification import Check

_HOMES = {
    "netlathe.analysis.cost": ("Cost", "cost"),
    "netlathe.api": ("capture", "compile", "plan", "user_cache_dir"),
    "netlathe.diagnostics": (
        "CaptureError",
        "Diagnostic",
        "GateError",
        "InputError",
        "LowerError",
        "MissingExtraError",
        "NetLatheError",
        "OptionError",
        "PassError",
        "VerifyError",
    ),
    "netlathe.pipeline.interfaces": ("Artifact", "Backend", "Captured", "Frontend", "Target"),
    "netlathe.pipeline.ledger": ("Entry",),
    "netlathe.pipeline.loss": ("Loss",),
    "netlathe.pipeline.pass_": (
        "ChoosingPass",
        "Context",
        "Equivalent",
        "Exact",
        "Lossy",
        "Pass",
        "Reference",
        "Result",
        "option",
        "options",
    ),
    "netlathe.pipeline.run": ("Compiled",),
    "netlathe.pipeline.step": ("Step",),
    "netlathe.pipeline.verification": ("Check",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Artifact",
    "Backend",
    "CaptureError",
    "Captured",
    "Check",
    "ChoosingPass",
    "Compiled",
    "Context",
    "Cost",
    "Diagnostic",
    "Entry",
    "Equivalent",
    "Exact",
    "Frontend",
    "GateError",
    "InputError",
    "Loss",
    "Lossy",
    "LowerError",
    "MissingExtraError",
    "NetLatheError",
    "OptionError",
    "Pass",
    "PassError",
    "Reference",
    "Result",
    "Step",
    "Target",
    "VerifyError",
    "__version__",
    "capture",
    "compile",
    "cost",
    "option",
    "options",
    "plan",
    "user_cache_dir",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
