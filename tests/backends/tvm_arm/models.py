"""The zoo's models at the precisions that ARM code is checked at."""

from __future__ import annotations

from functools import lru_cache

import onnx_ir as ir

from netlathe.ir import normal
from netlathe.passes.fold_batch_norm import FoldBatchNorm
from netlathe.passes.quantize import Quantize
from netlathe.pipeline.pass_ import Context, Feeds
from tests import zoo_ir

BOUND = 1e-4  # the project's, of the RMS
MODELS = ("minilm", "mobilenet_v2", "llama")
PRECISIONS = {
    "float32": None,
    "int8": Quantize(activations="int8", min_size=0),
    "int4": Quantize(weights="int4", group_size=32, min_size=0),
}


@lru_cache(maxsize=2)
def model_at(name: str, precision: str) -> tuple[ir.Model, list[Feeds]]:
    """The model with dynamic dims, and inputs of two sizes."""
    model = zoo_ir.captured(name)
    names = [value.name or "" for value in model.graph.inputs if not value.is_initializer()]
    fed: list[Feeds] = [{key: feeds[key] for key in names} for feeds in zoo_ir.feeds(name)]
    FoldBatchNorm().run(model, Context())
    normal.normalize(model)
    pass_ = PRECISIONS[precision]
    if pass_ is not None:
        pass_.run(model, Context(calibration=fed))
        normal.normalize(model)
    return model, fed
