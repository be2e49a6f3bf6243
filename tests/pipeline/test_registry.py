"""What is installed: ours, plugins, and what to say about those that are absent or broken."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
import pytest

from netlathe.diagnostics import InputError, MissingExtraError, OptionError
from netlathe.pipeline import registry
from tests.pipeline.plugin import MODULE, install

ROOT = Path(__file__).parents[2]


def declared(group: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return sorted(project["entry-points"][group])


def test_everything_declared_is_found_by_its_own_name() -> None:
    for group, found in (
        ("netlathe.passes", registry.passes()),
        ("netlathe.frontends", registry.frontends()),
        ("netlathe.backends", registry.backends()),
    ):
        assert list(found) == declared(group)
        assert all(kind.name == name for name, kind in found.items())
    assert registry.pass_names() == declared("netlathe.passes")


def test_near_names() -> None:
    with pytest.raises(OptionError, match="did you mean quantize") as caught:
        registry.find_pass("quantise")
    assert caught.value.exit_code == 2
    with pytest.raises(OptionError, match="did you mean onnx"):
        registry.find_target("onxx")


# -- targets --------------------------------------------------------------------------------------


def test_targets_and_their_settings() -> None:
    names = [
        "arm-cortex-a72",
        "arm-neoverse-n1",
        "arm-neoverse-v1",
        "cuda-sm80",
        "cuda-sm86",
        "cuda-sm89",
        "cuda-sm90",
        "fpga-ecp5-85f",
        "fpga-u280",
        "fpga-vhk158",
        "onnx",
        "onnx-ort",
        "torch",
        "tvm-x86",
    ]
    assert [target.name for target in registry.targets()] == names
    backend, target = registry.find_target("onnx", opset=18)
    assert backend.name == "onnx" and target.settings["opset"] == 18
    assert registry.find_target("onnx")[1].settings["opset"] == 24
    with pytest.raises(OptionError, match=r"no setting opst") as caught:
        registry.find_target("onnx", opst=18)
    assert "did you mean opset" in str(caught.value)
    with pytest.raises(OptionError, match="torch takes no settings"):
        registry.find_target("torch", opset=18)


TWO_TARGETS = """
from netlathe.pipeline.interfaces import Backend, Target

class Chip(Backend):
    name = "chip"

    @classmethod
    def targets(cls):
        return [Target("chip/small", "chip", "a small chip"), Target("{other}", "chip", "other")]

    def unsupported(self, model, target):
        return []

    def compile(self, model, target):
        raise NotImplementedError
"""


def test_a_target_need_not_be_called_like_its_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = "[netlathe.backends]\nchip = {module}:Chip\n"
    install(tmp_path, monkeypatch, "chips", entries, TWO_TARGETS.format(other="chip/large"))
    backend, target = registry.find_target("chip/small")
    assert backend.name == "chip" and target.help == "a small chip"
    with pytest.raises(OptionError, match="did you mean chip/small"):
        registry.find_target("chip/smol")


def test_two_backends_with_one_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = "[netlathe.backends]\nchip = {module}:Chip\n"
    install(tmp_path, monkeypatch, "chips", entries, TWO_TARGETS.format(other="x"))
    source = TWO_TARGETS.format(other="y").replace('name = "chip"', 'name = "chop"')
    entries = "[netlathe.backends]\nchop = {module}:Chip\n"
    install(tmp_path, monkeypatch, "chops", entries, source)
    with pytest.raises(OptionError, match="a target 'chip/small': chip and chop"):
        registry.find_target("chip/small")


# -- frontends ------------------------------------------------------------------------------------


def test_sources_find_their_frontend(tmp_path: Path) -> None:
    import torch

    assert registry.find_frontend(tmp_path / "model.onnx").name == "onnx_file"
    assert registry.find_frontend(str(tmp_path)).name == "huggingface"
    assert registry.find_frontend(torch.nn.Linear(1, 1)).name == "torch_module"
    graph = torch.fx.symbolic_trace(torch.nn.Linear(1, 1))
    assert registry.find_frontend(graph).name == "torch_fx"
    with pytest.raises(InputError, match="no frontend takes an object of type int"):
        registry.find_frontend(3)


# -- plugins --------------------------------------------------------------------------------------


def test_a_plugin_brings_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(tmp_path, monkeypatch)
    assert module not in sys.modules
    assert "polish" in registry.pass_names() and module not in sys.modules
    polish = registry.find_pass("polish")
    assert polish.version == 3 and registry.passes()["polish"] is polish
    assert registry.distribution_of(polish()) == "shiny 1.5"


def test_the_same_name_from_two_distributions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    install(tmp_path, monkeypatch, "glossy")
    for ask in (registry.passes, registry.pass_names, lambda: registry.find_pass("drop")):
        with pytest.raises(
            OptionError, match="'polish' comes from two distributions: glossy and shiny"
        ):
            ask()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
        ("1 / 0", "ZeroDivisionError"),
        ("Polish = 3", "is no Pass"),
        (MODULE.replace('"polish"', '"polis"'), "calls itself 'polis'"),
        ("class Polish: pass", "is no Pass"),
        ("", "AttributeError"),
    ],
)
def test_a_broken_plugin_is_named_and_harms_no_other_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, says: str
) -> None:
    install(tmp_path, monkeypatch, "broken", source=source)
    monkeypatch.delitem(sys.modules, "broken_module", raising=False)
    assert registry.find_pass("fold_norms").name == "fold_norms"
    for ask in (registry.passes, lambda: registry.find_pass("polish")):
        monkeypatch.delitem(sys.modules, "broken_module", raising=False)
        with pytest.raises(OptionError, match="'polish' of broken cannot be loaded") as caught:
            ask()
        assert says in str(caught.value) and "uninstall broken" in str(caught.value)


def test_a_name_that_cannot_be_written_in_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = "[netlathe.passes]\npol-ish = {module}:Polish\n"
    source = MODULE.replace('"polish"', '"pol-ish"')
    install(tmp_path, monkeypatch, "dashing", entries, source)
    with pytest.raises(OptionError, match="'pol-ish' is no Python identifier"):
        registry.passes()


# -- extras ---------------------------------------------------------------------------------------

REQUIRES = "Provides-Extra: wax\nRequires-Dist: Bees_Wax>=2; extra == 'wax'\n"


def test_an_absent_extra_is_named_when_asked_for_and_no_error_in_a_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "import bees_wax.fine\n" + MODULE
    install(tmp_path, monkeypatch, "waxed", source=source, requires=REQUIRES)
    assert "polish" not in registry.passes() and "fold_norms" in registry.passes()
    with pytest.raises(MissingExtraError) as caught:
        registry.find_pass("polish")
    assert str(caught.value).splitlines() == [
        "error[extra.missing]: the pass 'polish' needs the 'wax' extra of waxed"
        " (bees_wax is not installed)",
        "  help: pip install 'waxed[wax]'",
    ]


def test_the_extra_that_an_entry_point_names_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = "[netlathe.passes]\npolish = {module}:Polish [all]\n"
    source = "import bees_wax\n" + MODULE
    install(tmp_path, monkeypatch, "waxed", entries, source, REQUIRES)
    with pytest.raises(MissingExtraError, match=r"the 'all' extra"):
        registry.find_pass("polish")


BASE_INSTALL = """
import sys
from pathlib import Path

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "tvm", "tvm_ffi"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
from netlathe.diagnostics import MissingExtraError
from netlathe.pipeline import registry

assert sorted(registry.frontends()) == ["onnx_file"], registry.frontends()
arm = ["arm-cortex-a72", "arm-neoverse-n1", "arm-neoverse-v1"]
cuda = [f"cuda-sm{number}" for number in (80, 86, 89, 90)]
fpga = ["fpga-ecp5-85f", "fpga-u280", "fpga-vhk158"]
names = [*arm, *cuda, *fpga, "onnx", "onnx-ort", "tvm-x86"]  # they ask when used
assert [target.name for target in registry.targets()] == names
assert registry.find_frontend("model.onnx").name == "onnx_file"
for ask in (
    lambda: registry.find_target("torch"),
    lambda: registry.find_frontend(Path.cwd()),
):
    try:
        ask()
    except MissingExtraError as error:
        print(error)
    else:
        raise AssertionError("found what is not installed")
assert "torch" not in sys.modules
"""


def test_a_base_install_lists_what_it_has_and_names_the_extra_for_the_rest() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BASE_INSTALL], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "needs the 'torch' extra of netlathe (torch is not installed)" in done.stdout
    assert "huggingface needs the" in done.stdout and "pip install 'netlathe[" in done.stdout


def test_entry_points_that_need_an_extra_are_asked_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that an ONNX file imports no torch, whatever the names are."""
    heavy = "from netlathe import Frontend\nclass F(Frontend):\n    name = 'a'\n"
    heavy += (
        "    accepts = classmethod(lambda cls, source: True)\n    def capture(self, source): ...\n"
    )
    entries = "[netlathe.frontends]\na = {module}:F [wax]\n"
    module = install(tmp_path, monkeypatch, "heavy", entries, heavy, REQUIRES)
    assert registry.find_frontend(tmp_path / "x.onnx").name == "onnx_file"
    assert module not in sys.modules


def test_ours_come_from_our_distribution() -> None:
    pass_ = registry.find_pass("fold_norms")()
    assert registry.distribution_of(pass_) == f"netlathe {metadata.version('netlathe')}"
    assert isinstance(pass_, ir.passes.PassBase)
