"""A compilation written down: a YAML file that names the passes and what they run with.

    passes:
      - cleanup
      - drop: {kind: ffn, count: 1}
      - quantize: {weights: int8}
    calibration: sentences.txt      # beside the recipe
    target: onnx
    settings: {opset: 21}
    seed: 0
    strict: true

`json_schema` describes the same to an editor, with the options of every installed pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml

from netlathe.diagnostics import Diagnostic, InputError, OptionError, did_you_mean
from netlathe.pipeline import registry
from netlathe.pipeline.pass_ import Pass, summary
from netlathe.pipeline.validation import make

_HELP = "`netlathe passes --schema` prints the JSON schema of a recipe"
_PLAIN = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
Where = tuple[Hashable, ...]  # keys and indices from the top of the document


class Recipe(pydantic.BaseModel):
    """What a recipe file says."""

    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True
    )

    passes: Annotated[tuple[Pass, ...], pydantic.WithJsonSchema({"type": "array"})] = (
        pydantic.Field(description="what to run, in order")
    )
    calibration: Path | None = pydantic.Field(
        default=None,
        description="data for passes that measure (.npz or .txt), relative to the recipe",
    )
    target: str = pydantic.Field(default="onnx", description="what to build for")
    settings: dict[str, Any] = pydantic.Field(default={}, description="settings of the target")
    seed: int = pydantic.Field(default=0, ge=0, description="the one source of randomness")
    strict: bool = pydantic.Field(
        default=False, description="whether a skipped candidate is an error"
    )


def load(path: str | Path, find: Callable[[str], type[Pass]] | None = None) -> Recipe:
    """The recipe in the file ``path``; ``find`` as for :func:`netlathe.pipeline.text.parse`.

    Raises:
        InputError: the file cannot be read or is not YAML.
        OptionError: a key, pass, option, target or value is unknown or impossible; all of them are
            named, with file and line.
        MissingExtraError: a pass or the target needs an extra that is not installed.
    """
    path = Path(path)
    document = _Document(path)
    data = document.data
    if not isinstance(data, dict):
        message = "a recipe is a mapping with the key 'passes'"
        raise OptionError(Diagnostic("recipe.form", message, at=document.at(()), help=_HELP))
    known = list(Recipe.model_fields)
    problems = [
        Diagnostic(
            "recipe.unknown_key",
            f"a recipe has no key {key!r}",
            at=document.at((key,)),
            help=did_you_mean(str(key), known),
        )
        for key in data
        if key not in known
    ]
    values = {str(key): value for key, value in data.items() if key in known}
    if isinstance(values.get("passes"), list):
        values["passes"] = _passes(values["passes"], document, problems, find)
    if isinstance(values.get("calibration"), str):
        values["calibration"] = path.parent / values["calibration"]
    recipe = None
    try:
        recipe = Recipe(**values)
        registry.find_target(recipe.target, **recipe.settings)
    except pydantic.ValidationError as error:
        problems += [_explain(found, document) for found in error.errors(include_url=False)]
    except OptionError as error:
        problems += _placed(error, document.at(("target",)))
    if problems or recipe is None:
        raise OptionError(problems)
    return recipe


def json_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of a recipe; passes and targets are those that are installed."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "NetLathe recipe"
    definitions: dict[str, Any] = {}
    bare: list[str] = []  # passes that need no option
    for name, pass_type in registry.passes().items():
        own = pydantic.TypeAdapter(pass_type).json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        definitions.update({f"{name}.{key}": d for key, d in own.pop("$defs", {}).items()})
        definitions[name] = {**own, "title": name, "description": summary(pass_type)}
        if not own.get("required"):
            bare.append(name)
    with_options = {
        "type": "object",
        "properties": {name: {"$ref": f"#/$defs/{name}"} for name in registry.pass_names()},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    schema["properties"]["passes"]["items"] = {"oneOf": [{"enum": bare}, with_options]}
    schema["properties"]["target"]["enum"] = [target.name for target in registry.targets()]
    schema["$defs"] = definitions
    return schema


def _passes(
    items: list[Any],
    document: _Document,
    problems: list[Diagnostic],
    find: Callable[[str], type[Pass]] | None,
) -> tuple[Pass, ...]:
    """The passes of a recipe; what is wrong with them goes to ``problems``."""
    made: list[Pass] = []
    for number, item in enumerate(items):
        place: Where = ("passes", number)
        single = isinstance(item, dict) and len(item) == 1
        name, values = next(iter(item.items())) if single else (item, {})
        if not isinstance(name, str) or not isinstance(values, dict):
            message = "a pass is its name, or its name with a mapping of options"
            help_ = "for example: - drop: {kind: ffn, count: 1}"
            problems.append(Diagnostic("recipe.pass", message, at=document.at(place), help=help_))
            continue
        place = (*place, name) if single else place
        try:
            pass_type = (find or registry.find_pass)(name)
            made.append(_pass(pass_type, values, place, document))
        except OptionError as error:
            problems += _placed(error, document.at(place))
    return tuple(made)


def _pass(
    pass_type: type[Pass], values: Mapping[str, Any], place: Where, document: _Document
) -> Pass:
    return make(pass_type, values, lambda option: document.at((*place, option)))


def _placed(error: OptionError, place: str) -> list[Diagnostic]:
    """The diagnostics of ``error``, at ``place`` where they know no better."""
    return [dataclasses.replace(d, at=d.at or place) for d in error.diagnostics]


def _explain(found: Mapping[str, Any], document: _Document) -> Diagnostic:
    key = found["loc"][0]
    if found["type"] == "missing":
        message = f"a recipe needs the key {key!r}"
        return Diagnostic("recipe.missing_key", message, at=document.at(()), help=_HELP)
    says = str(found["msg"]).removeprefix("Input ").replace("should be", "must be", 1)
    message = f"{key} {says}, got {found['input']!r}"
    return Diagnostic("recipe.value", message, at=document.at(tuple(found["loc"])), help=_HELP)


class _Document:
    """A YAML file as plain data that knows the line of every key and item."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[Where, int] = {}
        self._open: set[yaml.Node] = set()  # being read: an alias to one of them has no end
        try:
            self._loader = yaml.SafeLoader(path.read_text("utf-8"))
            root = self._loader.get_single_node()
            self.data = None if root is None else self._read(root, ())
        except OSError as error:
            message = f"cannot read the recipe: {error.strerror or error}"
            raise InputError(Diagnostic("recipe.io", message, at=str(path))) from error
        except UnicodeDecodeError as error:
            raise InputError(
                Diagnostic("recipe.yaml", "the recipe is not UTF-8 text", at=str(path))
            ) from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
            problem = ", ".join(filter(None, (error.context, error.problem)))
            raise InputError(Diagnostic("recipe.yaml", problem, at=place)) from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            # a character YAML forbids; an impossible date; nested too deeply
            raise InputError(Diagnostic("recipe.yaml", str(error), at=str(path))) from error

    def at(self, where: Where) -> str:
        """``file:line`` of the key or item, or of the nearest one around it."""
        while where and where not in self._lines:
            where = where[:-1]
        return f"{self._path}:{self._lines.get(where, 1)}"

    def _read(self, node: yaml.Node, where: Where) -> Any:
        """Plain data; refuses what `yaml.safe_load` would let pass: repeated keys, endless aliases."""
        if node in self._open:
            raise self._error(node, "an alias stands inside what it names")
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN:
            raise self._error(node, f"the tag {node.tag} has no meaning here")
        self._open.add(node)
        self._lines.setdefault(where, node.start_mark.line + 1)
        data: Any
        if isinstance(node, yaml.MappingNode):
            data = {}
            for key_node, value_node in node.value:
                key = self._loader.construct_object(key_node, deep=True)
                if not isinstance(key, Hashable) or key in data:
                    raise self._error(key_node, f"the key {key_node.value!r} is here twice")
                self._lines[*where, key] = key_node.start_mark.line + 1
                data[key] = self._read(value_node, (*where, key))
        elif isinstance(node, yaml.SequenceNode):
            data = [self._read(item, (*where, i)) for i, item in enumerate(node.value)]
        else:
            data = self._loader.construct_object(node, deep=True)
        self._open.discard(node)
        return data

    def _error(self, node: yaml.Node, message: str) -> InputError:
        place = f"{self._path}:{node.start_mark.line + 1}"
        return InputError(Diagnostic("recipe.yaml", message, at=place))
