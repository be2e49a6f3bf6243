"""The wheel holds one copy of everything, the links and guards work, and the base needs no torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("passes", "frontends", "backends")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", LINKED)
def test_link_points_to_the_folder_at_the_root(name: str) -> None:
    link = ROOT / "netlathe" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", LINKED)
def test_bare_import_is_refused(name: str) -> None:
    done = run_python(f"import {name}")
    assert done.returncode != 0
    assert f"import netlathe.{name}, not {name}" in done.stderr


@pytest.mark.parametrize("kind", LINKED)
def test_every_entry_point_loads_under_its_own_name(kind: str) -> None:
    ours = [e for e in entry_points(group=f"netlathe.{kind}") if e.value.startswith("netlathe.")]
    assert ours
    for entry in ours:
        assert entry.load().name == entry.name


def test_base_install_needs_no_extra() -> None:
    blocked = ("torch", "transformers", "safetensors", "tokenizers", "onnxscript")
    done = run_python(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import netlathe, netlathe.cli\n"
        "from netlathe.pipeline import text\n"
        "for name in ('cleanup', 'fold_batch_norm', 'quantize'):\n"
        "    print(*text.parse(name))\n"
    )
    assert done.stdout.split() == ["cleanup", "fold_batch_norm", "quantize"], done.stderr


def test_wheel_holds_one_copy_of_every_module(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, so that no stale build folder gets in
    source.mkdir()
    for folder in ("netlathe", *LINKED):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    inside = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("netlathe", *LINKED)
        for path in (ROOT / folder).rglob("*.py")
        if not path.relative_to(ROOT).as_posix().startswith(tuple(f"netlathe/{n}/" for n in LINKED))
    }
    expected = {f if f.startswith("netlathe/") else f"netlathe/{f}" for f in files}
    assert sorted(inside) == sorted(expected)
