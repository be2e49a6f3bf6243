"""Recipes: what a file may say, what its errors show, and that the published schema agrees."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from netlathe.diagnostics import InputError, OptionError
from netlathe.pipeline import recipe, registry
from netlathe.pipeline.pass_ import Pass
from tests.pipeline.toy import Balance, Cut, ReluToMax


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only the toy passes be installed."""
    known: dict[str, type[Pass]] = {"balance": Balance, "cut": Cut, "relu_to_max": ReluToMax}

    def find(name: str) -> type[Pass]:
        if name not in known:
            return registry._PASSES.find(name)
        return known[name]

    monkeypatch.setattr(registry, "find_pass", find)
    monkeypatch.setattr(registry, "passes", lambda: known)
    monkeypatch.setattr(registry, "pass_names", lambda: list(known))


FULL = """\
passes:
  - relu_to_max
  - cut: {count: 3, side: first}
  - balance:
      factor: 2
calibration: data/texts.txt
target: onnx
settings: {opset: 21}
seed: 7
strict: true
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def test_a_recipe(tmp_path: Path) -> None:
    found = recipe.load(write(tmp_path, FULL))
    assert found.passes == (ReluToMax(), Cut(count=3, side="first"), Balance(factor=2.0))
    assert found.calibration == tmp_path / "data" / "texts.txt"
    assert (found.target, found.settings, found.seed, found.strict) == (
        "onnx",
        {"opset": 21},
        7,
        True,
    )


def test_defaults(tmp_path: Path) -> None:
    found = recipe.load(str(write(tmp_path, "passes: []")))
    assert found == recipe.Recipe(passes=())
    assert (found.target, found.settings, found.seed, found.strict) == ("onnx", {}, 0, False)


# -- the schema and the loader say the same -------------------------------------------------------

GOOD = [
    FULL,
    "passes: []",
    "passes: [cut]",
    "passes: [cut: {}]",
    "passes:\n- cut:\n    count: 0\nseed: 0",
    "passes: [balance: {factor: 1.5}]\nstrict: false\ncalibration: null",
    "passes: &all [cut]\ntarget: torch",
]
BAD = [
    "[]",
    "passes",
    "seed: 3",
    "passes: cut",
    "passes: [3]",
    "passes: [null]",
    "passes: [[cut]]",
    "passes: [cat]",
    "passes: [cut: null]",
    "passes: [cut: [3]]",
    "passes: [{cut: {}, balance: {}}]",
    "passes: [{}]",
    "passes: [cut: {cuont: 3}]",
    "passes: [cut: {count: 8}]",
    "passes: [cut: {count: -1}]",
    "passes: [cut: {count: '3'}]",
    "passes: [cut: {count: true}]",
    "passes: [cut: {side: left}]",
    "passes: [balance: {factor: 0}]",
    "passes: []\nsed: 3",
    "passes: []\nseed: -1",
    "passes: []\nseed: '3'",
    "passes: []\nseed: true",
    "passes: []\nstrict: 1",
    "passes: []\ntarget: onnxx",
    "passes: []\ntarget: [onnx]",
    "passes: []\nsettings: 17",
    "passes: []\ncalibration: 3",
]


@pytest.mark.parametrize("text", GOOD)
def test_what_is_right_for_both(tmp_path: Path, text: str) -> None:
    recipe.load(write(tmp_path, text))
    jsonschema.Draft202012Validator(recipe.json_schema()).validate(yaml.safe_load(text))


@pytest.mark.parametrize("text", BAD)
def test_what_is_wrong_for_both(tmp_path: Path, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        recipe.load(write(tmp_path, text))
    assert all("recipe.yaml:" in d.at for d in caught.value.diagnostics)
    checker = jsonschema.Draft202012Validator(recipe.json_schema())
    assert not checker.is_valid(yaml.safe_load(text))


def test_the_schema_is_one_and_explains_every_option() -> None:
    schema = recipe.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$defs"]["cut"]["properties"]["count"] == {
        "default": 2,
        "description": "how many channels to remove",
        "exclusiveMaximum": 8,
        "minimum": 0,
        "title": "Count",
        "type": "integer",
    }
    assert schema["$defs"]["cut"]["description"] == "Removes the last hidden channels."
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
    assert schema["properties"]["target"]["enum"] == names


# -- errors ---------------------------------------------------------------------------------------


def errors(folder: Path, text: str) -> list[str]:
    with pytest.raises(OptionError) as caught:
        recipe.load(write(folder, text))
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(folder), "DIR").splitlines()


def test_an_unknown_key_shows_line_and_near_names(tmp_path: Path) -> None:
    assert errors(tmp_path, "passes: []\nseed: 1\nstirct: true\n") == [
        "error[recipe.unknown_key]: a recipe has no key 'stirct'",
        "  at  DIR/recipe.yaml:3",
        "  help: did you mean strict or target?",
    ]


def test_an_option_out_of_range_shows_its_own_line(tmp_path: Path) -> None:
    assert errors(tmp_path, "passes:\n- relu_to_max\n- cut:\n    side: last\n    count: 9\n") == [
        "error[option.value]: cut: count must be less than 8, got 9",
        "  at  DIR/recipe.yaml:5",
        "  help: count takes integer >= 0 and < 8: how many channels to remove",
    ]


def test_an_unknown_pass_and_an_unknown_setting(tmp_path: Path) -> None:
    lines = errors(tmp_path, "passes:\n- relu_to_max\n- fold_norm\n")
    assert lines[:2] == [
        "error[pass.unknown]: there is no pass 'fold_norm'",
        "  at  DIR/recipe.yaml:3",
    ]
    assert "fold_norms" in lines[2]
    lines = errors(tmp_path, "passes: []\ntarget: onnx\nsettings: {opste: 3}\n")
    assert lines[0] == "error[target.setting]: target onnx has no setting opste"
    assert lines[1] == "  at  DIR/recipe.yaml:2"


def test_everything_wrong_at_once(tmp_path: Path) -> None:
    text = "passes: [cut: {count: 9}, balance: {factor: -1, f: 2}]\nsed: 1\nseed: -1\n"
    codes = [line for line in errors(tmp_path, text) if line.startswith("error")]
    assert len(codes) == 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("passes: [cut", "DIR/recipe.yaml:1"),
        ("passes:\n\t- cut", "DIR/recipe.yaml:2"),
        ("passes: []\nseed: 1\nseed: 2", "the key 'seed' is here twice\n  at  DIR/recipe.yaml:3"),
        ("passes: &a [*a]", "an alias stands inside what it names"),
        ("passes: !!python/object/apply:os.system [ls]", "os.system has no meaning"),
        ("passes: []\nseed: !!python/name:os.x", "DIR/recipe.yaml:2"),
        ("passes: []\nseed: 2020-99-99", "DIR/recipe.yaml"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("[" * 5000, "DIR/recipe.yaml"),
        ("\x00", "DIR/recipe.yaml"),
    ],
)
def test_what_is_no_yaml_or_no_data(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=r"recipe\.yaml") as caught:
        recipe.load(write(tmp_path, text))
    assert says in str(caught.value).replace(str(tmp_path), "DIR")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the recipe: No such file"):
        recipe.load(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match=r"cannot read the recipe: Is a directory"):
        recipe.load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match="not UTF-8"):
        recipe.load(tmp_path / "binary.yaml")
    with pytest.raises(OptionError, match="a recipe is a mapping"):
        recipe.load(write(tmp_path, ""))
