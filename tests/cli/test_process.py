"""The command as a process: a quick start, honest exit codes, and nothing left after a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import netlathe
from tests.cli.conftest import Run, tree

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "sympy", "numpy", "pydantic")


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True)


def test_help_imports_nothing_heavy() -> None:
    """So that it is there at once; what a command needs is imported when it runs."""
    script = f"""
import sys
from netlathe.cli import main
for words in (["--help"], ["compile", "--help"], ["bench", "-h"], ["--version"]):
    assert main(words) == 0
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = python(script)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"


def test_the_installed_command_is_ours() -> None:
    command = Path(sys.executable).with_name("netlathe")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert netlathe.__version__ in done.stdout


@pytest.mark.parametrize(
    "command", ["compile", "plan", "inspect", "verify", "diff", "bench", "bisect", "cache"]
)
def test_help_teaches_by_example(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.code == 0 and f"netlathe {command} " in done.out.split("Usage:")[1][10:]


def test_every_command_is_listed(run: Run) -> None:
    done = run("--help")
    listed = [line.split()[0] for line in done.out.split("Commands:")[1].splitlines() if line]
    commands = ["compile", "plan", "inspect", "verify", "diff", "bench", "bisect", "passes"]
    assert listed == [*commands, "targets", "cache"]


@pytest.mark.parametrize("words", [(), ("compil",), ("compile",), ("inspect", "--jason", "x")])
def test_wrong_usage_is_2(run: Run, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.code == 2 and "Usage" in done.err + done.out and "Traceback" not in done.err


EXTRAS = ("torch", "transformers", "onnxscript", "tokenizers", "safetensors", "torchvision")


def test_a_base_install_compiles_an_onnx_file(model: Path, tmp_path: Path) -> None:
    """Verification included: none of the extras is imported."""
    script = f"""
import sys
for name in {EXTRAS!r}: sys.modules[name] = None
from netlathe.cli import main
model, out = sys.argv[1:]
passes = 'fold_batch_norm, quantize(weights="int8", min_size=600)'
assert main(["compile", model, "--passes", passes, "-o", out]) == 0
assert main(["verify", out]) == 0
assert main(["diff", model, out]) == 0
assert main(["bench", model, out, "--rounds", "3"]) == 0
assert main(["targets"]) == 0
"""
    done = python(script, model, tmp_path / "out")
    assert done.returncode == 0, done.stderr


# The signal arrives when the model is written and its folder has no name yet.
_INTERRUPTED = """
import os, signal, sys, time
from netlathe.cli import main
from netlathe.pipeline import output

def stop(files, folder):
    assert (folder / "model.onnx").is_file()
    # A shell starts background jobs with SIGINT ignored; this one is in the foreground.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(10)

output.copy_files = stop
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_signal_leaves_nothing_under_the_name(
    run: Run, model: Path, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    out = tmp_path / "new" / "out"
    words = ("compile", model, "--passes", "fold_batch_norm", "-o", out)
    before = tree(tmp_path)
    done = python(_INTERRUPTED, int(sent), *words)
    assert done.returncode == code and "Traceback" not in done.stderr
    if sent != signal.SIGKILL:
        assert tree(tmp_path) == before
        return
    assert not out.exists()  # nobody can tidy up after that, but the next run does
    assert [p.name.startswith(".out.netlathe-new-") for p in out.parent.iterdir()] == [True]
    assert run(*words).code == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_signal_keeps_what_would_have_been_overwritten(
    run: Run, model: Path, tmp_path: Path
) -> None:
    words = ("compile", model, "--passes", "fold_batch_norm", "-o", tmp_path / "out")
    assert run(*words).code == 0
    before = tree(tmp_path)
    assert python(_INTERRUPTED, int(signal.SIGTERM), *words, "--overwrite").returncode == 143
    assert tree(tmp_path) == before


def test_the_handler_of_the_caller_is_put_back(run: Run) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run("--version")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_leaves_is_no_success(model: Path) -> None:
    """`netlathe inspect ... | head -0`: the pipe is closed before anything is printed."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "netlathe", "inspect", str(model), "--ir"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr


def test_json_is_all_there_is_on_stdout(run: Run, model: Path, tmp_path: Path) -> None:
    for words in (
        ("inspect", model),
        ("verify", model),
        ("diff", model, model),
        ("bench", model, "--rounds", 3),
        ("plan", model, "--passes", "fold_batch_norm"),
        ("compile", model, "--passes", "fold_batch_norm", "-o", tmp_path / "out"),
        ("passes", "quantize"),
        ("targets",),
    ):
        done = run(*words, "--json")
        assert done.code == 0 and isinstance(done.json, dict | list)
