"""Weights are found in their files by name and by bytes, however the library renamed or merged them."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from netlathe.diagnostics import InputError
from netlathe.frontends.checkpoint import Files, OthersMaps, Places, read_checkpoint

F32 = ir.DataType.FLOAT


def numbers(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write(folder: Path, **tensors: np.ndarray[Any, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def names(found: list[Any]) -> list[str]:
    return [place.name for place in found]


def test_found_by_name_and_believed_only_when_the_bytes_agree(tmp_path: Path) -> None:
    a, b = numbers(4, 5), numbers(4, 5, seed=1)
    places = Places(read_checkpoint(write(tmp_path, a=a, b=b)))
    assert names(places.find(["a"], F32, a)) == ["a"]
    assert names(places.find(["a"], F32, b)) == ["b"], "the name says a, the bytes say b"
    assert places.find(["a"], F32, a + 1) == []
    assert places.find(["a"], ir.DataType.INT32, a.view(np.int32)) == []


def test_equal_tensors_are_told_by_name(tmp_path: Path) -> None:
    zeros = np.zeros(8, np.float32)
    places = Places(read_checkpoint(write(tmp_path, first=zeros, second=zeros.copy())))
    assert names(places.find(["second"], F32, zeros)) == ["second"]
    assert names(places.find(["other"], F32, zeros)) == ["first"], "not the one that was found"
    assert len(places.find(["a third"], F32, zeros)) == 1


def test_a_merged_weight_is_its_parts_in_a_row(tmp_path: Path) -> None:
    gates = [numbers(6, 4, seed=i) for i in range(3)]
    ups = [numbers(6, 4, seed=10 + i) for i in range(3)]
    parts = {f"e{i}.gate": g for i, g in enumerate(gates)} | {
        f"e{i}.up": u for i, u in enumerate(ups)
    }
    places = Places(read_checkpoint(write(tmp_path, **parts, other=gates[0][:2].copy())))
    merged = np.stack([np.concatenate(pair) for pair in zip(gates, ups, strict=True)])
    found = places.find(["experts"], F32, merged)
    assert names(found) == ["e0.gate", "e0.up", "e1.gate", "e1.up", "e2.gate", "e2.up"]
    merged[2, 11, 3] += 1
    assert places.find(["experts"], F32, merged) == []


def test_small_tensors_and_prefixes_are_told_apart(tmp_path: Path) -> None:
    """Tensors shorter than what is looked up at once, and one that begins as another does."""
    long = numbers(100)
    changed = long.copy()
    changed[60] += 1
    places = Places(
        read_checkpoint(write(tmp_path, short=long[:3].copy(), long=long, changed=changed))
    )
    assert names(places.find([], F32, long[:3])) == ["short"]
    assert names(places.find([], F32, changed)) == ["changed"]
    assert names(places.find([], F32, np.concatenate([long[:3], changed]))) == ["short", "changed"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_dtypes_are_kept(dtype: type, tmp_path: Path) -> None:
    values: np.ndarray[Any, Any] = (numbers(3, 4) * 5).astype(dtype)
    header = {"t": {"dtype": _CODES[dtype], "shape": [3, 4], "data_offsets": [0, values.nbytes]}}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + values.tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    (place,) = read_checkpoint(tmp_path).values()
    for read in (place.array(), place.tensor("t").numpy(), Files().array(place)):
        assert read.dtype == dtype and read.tobytes() == values.tobytes()


_CODES = {np.float16: "F16", ml_dtypes.bfloat16: "BF16", np.int64: "I64", np.bool_: "BOOL"}


def test_an_empty_tensor_is_no_problem(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write(tmp_path, none=np.zeros((0, 4), np.float32), a=numbers(2)))
    assert checkpoint["none"].array().shape == (0, 4)
    assert Files().array(checkpoint["none"]).shape == (0, 4)
    assert names(Places(checkpoint).find([], F32, numbers(2))) == ["a"]


def test_views_of_a_file_are_private_and_can_be_given_back(tmp_path: Path) -> None:
    a = numbers(64, 64)
    folder = write(tmp_path, a=a)
    files, place = Files(), read_checkpoint(folder)["a"]
    view = files.array(place)
    view[0, 0] = 42
    assert np.array_equal(place.array(), a), "what is written does not reach the file"
    files.give_back()
    assert np.array_equal(view[1:], a[1:])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux' list of maps")
def test_pages_of_a_map_that_another_made_are_given_back(tmp_path: Path) -> None:
    """What was written to a private map tells: it goes with the page."""
    file, other = tmp_path / "a", tmp_path / "b"
    maps, arrays = [], []
    for path in (file, other):
        path.write_bytes(bytes(3 * mmap.PAGESIZE))
        with path.open("rb") as stream:
            maps.append(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
        arrays.append(np.frombuffer(maps[-1], np.uint8))
        arrays[-1][:] = 1
    OthersMaps([file]).give_back(arrays[0][10:])  # the first page is not all its own
    OthersMaps([file]).give_back(arrays[1])
    assert arrays[0].reshape(3, -1).any(1).tolist() == [True, False, False]
    assert arrays[1].all()


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_files_of_a_download_cache_are_links(link: Any, tmp_path: Path) -> None:
    """The library's own cache has links to files named by their hash, in another folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    a = numbers(3, 3)
    write(blobs, a=a).joinpath("model.safetensors").rename(blobs / "0123abc")
    link(blobs / "0123abc", snapshot / "model.safetensors")
    place = read_checkpoint(snapshot)["a"]
    assert np.array_equal(place.tensor("a").numpy(), a)


def test_shards_by_an_index_inside_the_folder_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path, **{name: numbers(2)}).joinpath("model.safetensors").rename(
            tmp_path / f"{name}.safetensors"
        )
    index = tmp_path / "model.safetensors.index.json"
    files = {"one": "one.safetensors", "two": "two.safetensors"}
    index.write_text(json.dumps({"weight_map": files}))
    assert read_checkpoint(tmp_path).keys() == {"one", "two"}
    for bad, words in (("../one.safetensors", "outside the folder"), ("no.safetensors", "missing")):
        index.write_text(json.dumps({"weight_map": files | {"two": bad}}))
        with pytest.raises(InputError, match=words):
            read_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(InputError, match="shard index"):
        read_checkpoint(tmp_path)


def header(**entry: Any) -> bytes:
    text = json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry})
    return len(text).to_bytes(8, "little") + text.encode() + bytes(8)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x01\x02", "cannot hold a header"),
        ((1 << 40).to_bytes(8, "little") + bytes(64), "cannot hold a header"),
        ((4).to_bytes(8, "little") + b"nope", "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not JSON"),
        (header(dtype="F17"), "dtype 'F17', which is not known"),
        (header(shape=[3]), r"shape \[3\] cannot be 8 bytes long"),
        (header(data_offsets=[8, 16]), "ends at byte"),
        (header(data_offsets="all"), "malformed"),
        (header(data_offsets=[-8, 0]), "malformed"),
    ],
)
def test_a_damaged_file_is_explained(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        read_checkpoint(tmp_path)
    assert caught.value.diagnostics[0].code == "hf.safetensors"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "w.pkl"])
def test_a_pickle_is_never_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(InputError, match="can run any code") as caught:
        read_checkpoint(tmp_path)
    assert caught.value.diagnostics[0].code == "hf.pickle"
    assert "save_pretrained" in caught.value.diagnostics[0].help
