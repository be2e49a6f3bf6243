"""Calibration data is read as it is meant, or refused with everything that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.diagnostics import InputError
from netlathe.execute import ort, samples
from netlathe.pipeline.calibration_data import SAMPLES_A_FEED, load
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.pass_ import Feeds
from tests.ir.onnx_text import matrix, model


def captured(made: ir.Model, tokenize: Any = None) -> Captured:
    return Captured(
        model=made,
        source="model",
        frontend="test",
        dynamic=samples.dynamic_dims(made),
        sample=lambda sizes, seed: samples.synthesize(made, sizes, seed),
        tokenize=tokenize,
    )


def tower(batch: str = "batch") -> Captured:
    """Two inputs that share their first dim."""
    return captured(
        model(
            f"float[{batch},4] x, int64[{batch},s] ids",
            "float y, float z",
            "y = MatMul(x, w)  z = Cast<to = 1>(ids)",
            w=matrix(4, 3),
        )
    )


def data(rows: int, **other: Any) -> dict[str, Any]:
    numbers = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    ids = np.arange(rows * 5, dtype=np.int64).reshape(rows, 5)
    return {"x": numbers, "ids": ids} | other


def saved(folder: Path, **arrays: Any) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def joined(feeds: Sequence[Feeds], name: str) -> np.ndarray:
    return np.concatenate([feed[name] for feed in feeds])


@pytest.mark.parametrize("rows", [1, SAMPLES_A_FEED, 2 * SAMPLES_A_FEED + 1])
def test_arrays_are_cut_along_the_first_axis(rows: int, tmp_path: Path) -> None:
    feeds = load(saved(tmp_path, **data(rows)), tower())
    assert len(feeds) == -(-rows // SAMPLES_A_FEED)
    for name, whole in data(rows).items():
        np.testing.assert_array_equal(joined(feeds, name), whole)
    ort.run(tower().model, feeds[-1])


def test_a_fixed_batch_is_kept(tmp_path: Path) -> None:
    feeds = load(saved(tmp_path, **data(6)), tower(batch="2"))
    assert [feed["x"].shape for feed in feeds] == [(2, 4)] * 3
    np.testing.assert_array_equal(joined(feeds, "ids"), data(6)["ids"])
    with pytest.raises(InputError, match="takes 2 at a time") as error:
        load(saved(tmp_path, **data(7)), tower(batch="2"))
    assert codes(error) == ["calibration.shape"]


def test_an_input_without_the_batch_is_given_to_every_feed(tmp_path: Path) -> None:
    made = captured(
        model("float[batch,4] x, float[1,4] shift, float scale", "float y", "y = Add(x, shift)")
    )
    shift, scale = matrix(1, 4), np.float32(2)
    feeds = load(saved(tmp_path, x=matrix(20, 4), shift=shift, scale=scale), made)
    assert len(feeds) == 3
    for feed in feeds:
        np.testing.assert_array_equal(feed["shift"], shift)
        assert feed["scale"].shape == ()


def test_a_model_without_a_batch_axis_takes_one_feed(tmp_path: Path) -> None:
    made = captured(model("float x", "float y", "y = Neg(x)"))
    (feeds,) = load(saved(tmp_path, x=np.float32(3)), made)
    assert feeds["x"] == 3


def test_a_dim_may_be_an_expression(tmp_path: Path) -> None:
    made = captured(
        model("float[b,n] x, float[b,m] past, int64[b,k] mask", "float y", "y = Neg(x)")
    )
    made.model.graph.inputs[2].shape = ir.Shape(["b", "m + n"])
    good = {"x": matrix(3, 2), "past": matrix(3, 4), "mask": np.ones((3, 6), np.int64)}
    assert len(load(saved(tmp_path, **good), made)) == 1
    good["mask"] = np.ones((3, 5), np.int64)
    with pytest.raises(InputError, match=r"\[3, 5\] does not fit the input's \[b, m \+ n\]"):
        load(saved(tmp_path, **good), made)


@pytest.mark.parametrize("batch", ["batch", "2"])
def test_labels_are_cut_with_the_samples(batch: str, tmp_path: Path) -> None:
    labels = np.arange(10) % 3
    feeds = load(saved(tmp_path, **data(10, labels=labels)), tower(batch))
    assert [len(feed["labels"]) for feed in feeds] == [len(feed["x"]) for feed in feeds]
    np.testing.assert_array_equal(joined(feeds, "labels"), labels)


# -- arrays that are refused ----------------------------------------------------------------------


def codes(error: pytest.ExceptionInfo[InputError]) -> list[str]:
    assert error.value.exit_code == 2
    return [diagnostic.code for diagnostic in error.value.diagnostics]


def planted(number: float) -> np.ndarray:
    array = data(20)["x"]
    array[17, 2] = number
    return array


@pytest.mark.parametrize(
    ("arrays", "code", "says"),
    [
        ({}, "empty", "no array"),
        (data(0), "empty", "no sample"),
        ({"x": data(3)["x"]}, "input", "no data for the model's input 'ids'"),
        (data(3, idz=np.ones(3)), "input", "did you mean ids"),
        (data(3, x=np.ones((3, 4))), "dtype", "is float64, the input is float32"),
        (data(3, ids=np.ones((3, 5), np.int32)), "dtype", "astype(np.int64)"),
        (data(3, x=np.array(["a"] * 3)), "dtype", "is <U1"),
        (data(3, x=matrix(3, 4, 1)), "shape", "[3, 4, 1] does not fit the input's [batch, 4]"),
        (data(3, x=matrix(3, 5)), "shape", "[3, 5] does not fit"),
        (data(3, x=np.float32(1)), "shape", "[] does not fit"),
        (data(3, x=matrix(4, 4)), "shape", "'x' has 4, 'ids' has 3"),
        (data(3, labels=np.zeros(4, int)), "shape", "'labels' has 4"),
        (data(3, labels=np.zeros(3)), "dtype", "'labels' is float64 of shape [3], not integers"),
        (data(3, labels=np.int64(0)), "dtype", "'labels' is int64 of shape [], not integers"),
        (data(3, x=planted(np.nan)), "finite", "holds nan at [17, 2] (1 such"),
        (data(3, x=planted(-np.inf)), "finite", "holds -inf at [17, 2]"),
    ],
)
def test_arrays_that_do_not_fit(
    arrays: dict[str, Any], code: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        load(saved(tmp_path, **arrays), tower())
    assert codes(error) == [f"calibration.{code}"]
    assert says in str(error.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load(saved(tmp_path, x=np.ones((3, 4)), other=np.ones(3)), tower())
    assert codes(error) == ["calibration.input", "calibration.input", "calibration.dtype"]


class Boom:
    """Loading it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def test_pickled_arrays_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "data.npz", x=np.array([Boom()], dtype=object))
    with pytest.raises(InputError, match="run any code") as error:
        load(tmp_path / "data.npz", tower())
    assert codes(error) == ["calibration.pickle"]
    assert not (tmp_path / "pwned").exists()


def npy(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, matrix(3, 4))


def cut_off(path: Path) -> None:
    np.savez(path, **data(100))
    path.write_bytes(path.read_bytes()[:-300])


def damaged(path: Path) -> None:
    np.savez(path, **data(100))
    content = bytearray(path.read_bytes())
    content[300] ^= 0xFF  # inside the first array: its checksum no longer holds
    path.write_bytes(content)


def damaged_header(path: Path) -> None:
    np.savez(path, **data(100))
    path.write_bytes(path.read_bytes().replace(b"'descr'", b"'DESCR'"))


@pytest.mark.parametrize(
    "spoil", [npy, cut_off, damaged, damaged_header, Path.touch, lambda p: p.write_text("a,b\n1,2")]
)
def test_what_is_no_npz_is_refused(spoil: Any, tmp_path: Path) -> None:
    spoil(tmp_path / "data.npz")
    with pytest.raises(InputError, match=r"not a whole \.npz") as error:
        load(tmp_path / "data.npz", tower())
    assert codes(error) == ["calibration.format"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, code, words in (
        ("none.npz", "file", "there is no such file"),
        (".", "file", "it is no file"),
        ("data.csv", "format", ".csv"),
    ):
        if name == "data.csv":
            (tmp_path / name).write_text("1,2")
        with pytest.raises(InputError, match=words) as error:
            load(tmp_path / name, tower())
        assert codes(error) == [f"calibration.{code}"]


# -- texts ----------------------------------------------------------------------------------------


def letters(texts: Sequence[str]) -> Feeds:
    """A token a letter, padded with 0 to the longest text."""
    longest = max(map(len, texts))
    ids = [[ord(c) for c in text] + [0] * (longest - len(text)) for text in texts]
    return {"ids": np.asarray(ids, np.int64)}


def reader(tokenize: Any = letters) -> Captured:
    return captured(model("int64[batch,s] ids", "float y", "y = Cast<to = 1>(ids)"), tokenize)


def test_texts_are_tokenized_a_few_at_a_time(tmp_path: Path) -> None:
    texts = ["one", "", "  ", *(str(n) * n for n in range(1, 10))]
    (tmp_path / "t.txt").write_text("\r\n".join(texts) + "\n", "utf-8")
    feeds = load(tmp_path / "t.txt", reader())
    assert [feed["ids"].shape for feed in feeds] == [(8, 7), (2, 9)]  # padded feed by feed
    assert feeds[0]["ids"][0].tolist() == [ord(c) for c in "one"] + [0] * 4


def test_a_cache_starts_empty(tmp_path: Path) -> None:
    made = captured(
        model(
            "int64[batch,s] ids, float[batch,2,past_sequence,4] k",
            "float y, float p",
            "y = Cast<to = 1>(ids) p = Neg(k)",
        ),
        letters,
    )
    made.model.graph.inputs[1].name = "past_key_values.0.key"
    (tmp_path / "t.txt").write_text("ab\nabc\n")
    (feeds,) = load(tmp_path / "t.txt", made)
    assert feeds["past_key_values.0.key"].shape == (2, 2, 0, 4)
    assert feeds["past_key_values.0.key"].dtype == np.float32
    assert ort.run(made.model, feeds)["p"].shape == (2, 2, 0, 4)


@pytest.mark.parametrize(
    ("content", "made", "code"),
    [
        (b"", reader(), "empty"),
        (b" \n\n\t\n", reader(), "empty"),
        (b"caf\xe9\n", reader(), "format"),
        (b"text\n", reader(None), "tokenizer"),
        (b"text\n", reader(lambda texts: {**letters(texts), "mask": np.ones(1)}), "input"),
        (b"text\n", reader(lambda texts: {}), "input"),
    ],
)
def test_texts_that_cannot_be_used(
    content: bytes, made: Captured, code: str, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(InputError) as error:
        load(tmp_path / "t.txt", made)
    assert set(codes(error)) == {f"calibration.{code}"}
