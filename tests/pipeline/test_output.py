"""An output folder is there whole or not at all, and never over what it is made from."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.diagnostics import Diagnostic, InputError, VerifyError
from netlathe.ir import weights
from netlathe.pipeline import output
from netlathe.pipeline.output import check_output, copy_files, write_whole
from tests.ir.onnx_text import model
from tests.pipeline.small_disk import file_size_limit, small_disk


def write_two(folder: Path) -> str:
    (folder / "inner").mkdir()
    (folder / "inner" / "data").write_bytes(b"x" * 1000)
    (folder / "manifest.json").write_text("{}")
    return "done"


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def code(error: pytest.ExceptionInfo[InputError]) -> str:
    return error.value.diagnostics[0].code


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An output of an earlier run."""
    folder = tmp_path / "out"
    write_whole(folder, lambda part: (part / "manifest.json").write_text("old"))
    return folder


def test_what_is_written_becomes_the_folder(tmp_path: Path) -> None:
    assert write_whole(tmp_path / "out", write_two) == "done"
    assert tree(tmp_path) == {"out", "out/inner", "out/inner/data", "out/manifest.json"}
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "out").stat().st_mode == plain.stat().st_mode  # not a private folder


def test_the_name_is_free_until_everything_is_there(tmp_path: Path) -> None:
    seen = []

    def write(part: Path) -> None:
        write_two(part)
        seen.append((tmp_path / "out").exists())
        assert part.parent == tmp_path

    write_whole(tmp_path / "out", write)
    assert seen == [False]


def test_missing_parents_are_made_and_go_again_on_failure(tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "b" / "out", write_two)
    assert (tmp_path / "a" / "b" / "out" / "manifest.json").is_file()

    def fail(part: Path) -> None:
        raise VerifyError(Diagnostic("test.failed", "no"))

    with pytest.raises(VerifyError):
        write_whole(tmp_path / "c" / "d" / "out", fail)
    assert not (tmp_path / "c").exists()


# -- existing folders -----------------------------------------------------------------------------


def test_an_existing_folder_is_refused(old: Path) -> None:
    with pytest.raises(InputError, match="--overwrite") as error:
        write_whole(old, write_two)
    assert code(error) == "output.exists"
    assert tree(old) == {"manifest.json"}


def test_what_another_run_has_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def overtaken(part: Path) -> None:
        write_two(part)
        write_whole(tmp_path / "out", lambda other: (other / "manifest.json").write_text("other"))

    with pytest.raises(InputError, match="--overwrite"):
        write_whole(tmp_path / "out", overtaken)
    assert tree(tmp_path) == {"out", "out/manifest.json"}


def test_overwriting_replaces_everything(old: Path, tmp_path: Path) -> None:
    write_whole(old, write_two, overwrite=True)
    assert tree(tmp_path) == {"out", "out/inner", "out/inner/data", "out/manifest.json"}


def test_overwriting_without_the_system_call(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_exchange", lambda a, b: False)
    write_whole(old, write_two, overwrite=True)
    assert tree(tmp_path) == {"out", "out/inner", "out/inner/data", "out/manifest.json"}


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_the_old_folder_is_there_at_every_moment(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between any two steps, an overwrite leaves the old or the new folder."""
    renames: list[Any] = []
    monkeypatch.setattr(Path, "rename", lambda self, target: renames.append((self, target)))
    write_whole(old, write_two, overwrite=True)
    assert not renames  # one exchange, no moment between two renames
    assert (old / "inner" / "data").is_file()


def test_a_failed_overwrite_keeps_the_old_folder(old: Path, tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        write_two(part)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(old, fail, overwrite=True)
    assert tree(tmp_path) == {"out", "out/manifest.json"}
    assert (old / "manifest.json").read_text() == "old"


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=r"manifest\.json") as error:
        write_whole(tmp_path / "home", write_two, overwrite=True)
    assert code(error) == "output.exists"
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_whole(tmp_path / "out", write_two, overwrite=True)
    assert "inner/data" in tree(tmp_path / "out")


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is a file"):
            write_whole(tmp_path / "out", write_two, overwrite=overwrite)


# -- sources --------------------------------------------------------------------------------------


def same(source: Path) -> Path:
    return source


def inside(source: Path) -> Path:
    return source / "compiled"


def deep_inside(source: Path) -> Path:
    return source / "a" / "b"


def above(source: Path) -> Path:
    return source.parent


def by_a_link(source: Path) -> Path:
    link = source.parent.parent / "link"
    link.symlink_to(source)
    return link / "compiled"


def with_dots(source: Path) -> Path:
    return source / ".." / source.name / "x"


@pytest.mark.parametrize("place", [same, inside, deep_inside, above, by_a_link, with_dots])
def test_the_output_may_not_touch_its_source(place: Callable[[Path], Path], tmp_path: Path) -> None:
    source = tmp_path / "models" / "mine"
    source.mkdir(parents=True)
    (source / "manifest.json").write_text("{}")  # as a compiled model has it
    (source.parent / "manifest.json").write_text("{}")
    before = tree(tmp_path / "models")
    with pytest.raises(InputError) as error:
        write_whole(place(source), write_two, overwrite=True, sources=[source])
    assert code(error) == "output.source"
    assert tree(tmp_path / "models") == before


def test_beside_the_source_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write_whole(tmp_path / "mine-small", write_two, sources=[tmp_path / "mine"])


def test_files_that_live_weights_are_mapped_from_are_sources(tmp_path: Path) -> None:
    """Found behind recipes too: they are read while the output is written."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "w.data").write_bytes(array.tobytes())
    mapped = ir.ExternalTensor(
        "w.data", 0, 48, ir.DataType.FLOAT, shape=ir.Shape([3, 4]), name="w", base_dir=folder
    )
    made = model("float[b,4] x", "float y", "y = MatMul(x, w)", w=np.zeros((4, 3), np.float32))
    turned = weights.transposed(mapped, [1, 0])
    made.graph.initializers["w"].const_value = weights.derived(
        turned, lambda a: a * 2, ir.DataType.FLOAT, [4, 3], "w"
    )
    assert weights.files(made) == {folder / "w.data"}
    with pytest.raises(InputError, match="contains") as error:
        write_whole(folder, write_two, overwrite=True, sources=weights.files(made))
    assert code(error) == "output.source"
    np.testing.assert_array_equal(weights.array(made.graph.initializers["w"]), array.T * 2)


# -- what cannot be written -----------------------------------------------------------------------


def test_a_file_as_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file/out", "file/a/out"):
        with pytest.raises(InputError, match="not a folder") as error:
            check_output(tmp_path / place)
        assert code(error) == "output.parent"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError) as error:
        write_whole(tmp_path / "closed" / "out", write_two)
    assert code(error) == "output.denied"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody may write to")
def test_a_file_system_that_takes_no_folders() -> None:
    """Nobody can make a folder in /proc, root included, though its permissions say otherwise."""
    with pytest.raises(InputError) as error:
        write_whole(Path("/proc/netlathe-out"), write_two)
    assert code(error) in {"output.denied", "output.failed"}
    assert "netlathe-new" not in str(error.value)


def write_much(part: Path) -> None:
    with open(part / "weights", "wb") as file:
        for _ in range(64):
            file.write(b"x" * 16384)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        with pytest.raises(InputError, match="disk is full") as error:
            write_whole(disk / "made" / "out", write_much)
        assert code(error) == "output.full"
        assert tree(disk) == set()


def test_a_full_disk_keeps_the_old_output(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        write_whole(disk / "out", write_two)
        before = tree(disk)
        with pytest.raises(InputError, match="disk is full"):
            write_whole(disk / "out", write_much, overwrite=True)
        assert tree(disk) == before


def test_a_writer_that_only_says_it_failed(tmp_path: Path) -> None:
    """torch's archive writer raises a RuntimeError without an errno."""

    def write(part: Path) -> None:
        try:
            write_much(part)
        except OSError:
            raise RuntimeError("failed writing file") from None

    with small_disk(tmp_path / "disk", 256) as disk:
        with pytest.raises(InputError, match="disk is full"):
            write_whole(disk / "out", write)
        assert tree(disk) == set()
        with pytest.raises(ZeroDivisionError):  # with room left it is what it says it is
            write_whole(disk / "out", lambda part: 1 / 0)


def test_a_file_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    with file_size_limit(100_000), pytest.raises(InputError) as error:
        write_whole(tmp_path / "out", write_much)
    assert code(error) == "output.full"
    assert tree(tmp_path) == set()


def test_an_error_of_something_that_is_read_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "out", lambda part: (tmp_path / "calibration.npz").read_bytes())
    assert tree(tmp_path) == set()


def test_an_unknown_failure_is_told_without_hidden_names(tmp_path: Path) -> None:
    def write(part: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(part / "weights"))

    with pytest.raises(InputError, match="Input/output error") as error:
        write_whole(tmp_path / "out", write)
    assert code(error) == "output.failed"
    assert "netlathe-new" not in str(error.value)


# -- killed runs ----------------------------------------------------------------------------------


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from netlathe.pipeline.output import write_whole
def write(part):
    (part / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path({str(tmp_path)!r}) / "out", write)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tree(tmp_path) - {path for path in tree(tmp_path) if path.endswith("/half")}
    assert left.startswith(".out.netlathe-new-")
    write_whole(tmp_path / "other", write_two)  # to whatever name it writes
    assert {path.split("/")[0] for path in tree(tmp_path)} == {"other"}


def test_a_run_at_work_is_left_alone(tmp_path: Path) -> None:
    def write(part: Path) -> None:
        write_whole(tmp_path / "b", write_two)  # sweeps
        assert part.exists()
        write_two(part)

    write_whole(tmp_path / "a", write)
    assert {path.split("/")[0] for path in tree(tmp_path)} == {"a", "b"}


def test_a_folder_set_aside_by_a_killed_run_comes_back(old: Path, tmp_path: Path) -> None:
    """Where two folders cannot be exchanged, a kill between two renames leaves the old one hidden."""
    old.rename(tmp_path / ".out.netlathe-old-0123abcd")
    write_whole(tmp_path / "other", write_two)
    assert (old / "manifest.json").read_text() == "old"


def test_similar_names_are_not_ours(tmp_path: Path) -> None:
    mine = [".out.netlathe-new-xyz", "out.netlathe-new-0123abcd", ".netlathe-new"]
    for name in mine:
        (tmp_path / name).mkdir()
    (tmp_path / ".file.netlathe-new-0123abcd").write_text("a file")
    write_whole(tmp_path / "out", write_two)
    assert {*mine, ".file.netlathe-new-0123abcd"} <= tree(tmp_path)


# -- files that travel ----------------------------------------------------------------------------


def test_files_travel_unchanged(tmp_path: Path) -> None:
    source = tmp_path / "source.json"
    source.write_bytes(b"\x00\r\n{}")
    (tmp_path / "link").symlink_to(source)
    folder = tmp_path / "out"
    folder.mkdir()
    copies = copy_files({"1_Pooling/config.json": source, "a": tmp_path / "link"}, folder)
    assert copies == [folder / "1_Pooling" / "config.json", folder / "a"]
    assert all(copy.read_bytes() == b"\x00\r\n{}" and not copy.is_symlink() for copy in copies)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "model.onnx"])
def test_a_file_that_would_land_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source.json"
    source.write_text("{}")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.onnx").write_text("the model")
    with pytest.raises(InputError) as error:
        copy_files({name: source}, folder)
    assert code(error) == "output.file"
    assert tree(tmp_path) == {"source.json", "out", "out/model.onnx"}
