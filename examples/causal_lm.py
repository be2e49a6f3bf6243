"""Compile a causal language model with its KV cache, and write text with what comes out.

    python examples/causal_lm.py                 # makes a small LLaMA first (about a minute)
    python examples/causal_lm.py path/to/model   # any local Hugging Face directory

Scales of the norms are folded into their neighbours, one attention goes, weights are stored in 8 bits.
The artifact generates through ONNX Runtime: one run for the prompt, then one a token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
import tiny_llama
from tokenizers import Tokenizer

import netlathe

PASSES = 'fold_norms, drop(kind="attention", count=1), quantize(weights="int8")'
TEXTS = (
    "The with statement is used to wrap the execution of a block",
    "A list display is a possibly empty series of expressions",
    "Names refer to objects. Names are introduced by name binding",
    "An assignment statement evaluates the expression list",
)


def generate(session: onnxruntime.InferenceSession, ids: list[int], count: int) -> list[int]:
    """``count`` tokens after ``ids``, each the most likely one.

    The graph takes ``past_key_values.N.key|value`` [batch, kv_heads, past, head_dim] and returns
    ``present.N.key|value``, which are the past of the next step.
    """
    past = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key_values")
    }
    names = [output.name for output in session.get_outputs()]
    made: list[int] = []
    new = np.array([ids])
    for _ in range(count):
        total = len(ids) + len(made)
        feeds = {"input_ids": new, "attention_mask": np.ones((1, total), np.int64), **past}
        results = [np.asarray(result) for result in session.run(names, feeds)]
        outputs = dict(zip(names, results, strict=True))
        made.append(int(outputs["logits"][0, -1].argmax()))
        new = np.array([[made[-1]]])
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=Path("out/tiny-llama"))
    parser.add_argument("--output", type=Path, default=Path("out/causal-lm"))
    arguments = parser.parse_args()
    if not arguments.model.exists():
        tiny_llama.make(arguments.model)

    captured = netlathe.capture(arguments.model, cache=True)
    # Scores are taken on whole texts, so the calibration runs start with an empty cache.
    assert captured.tokenize is not None
    empty = captured.sample({"batch": len(TEXTS), "past_sequence": 0}, 0)
    calibration = {k: v for k, v in empty.items() if k.startswith("past_key_values")}
    calibration |= dict(captured.tokenize(TEXTS))
    compiled = netlathe.compile(captured, PASSES, calibration=[calibration])
    for step in compiled.steps:
        print(f"{step.pass_}: {step.check}")
        for entry in step.entries:
            if entry.status == "applied" and step.pass_.name == "drop":
                print(f"  {entry.candidate} ({entry.where}): {entry.reason}")
    compiled.save(arguments.output / "compiled", overwrite=True)
    netlathe.compile(captured, "fold_norms").save(arguments.output / "folded", overwrite=True)
    netlathe.compile(captured, "").save(arguments.output / "dense", overwrite=True)

    tokenizer = Tokenizer.from_file(str(arguments.output / "compiled" / "tokenizer.json"))
    prompt = "The following table lists "
    ids = tokenizer.encode(prompt).ids
    texts = {}
    for name in ("dense", "folded", "compiled"):
        session = onnxruntime.InferenceSession(
            arguments.output / name / "model.onnx", providers=["CPUExecutionProvider"]
        )
        texts[name] = generate(session, ids, 40)
        print(f"{name:9} {prompt}{tokenizer.decode(texts[name])!r}")
    # Folding norms is exact up to rounding: the text must not change.
    if texts["folded"] != texts["dense"]:
        raise SystemExit("fold_norms changed the generated text")


if __name__ == "__main__":
    main()
