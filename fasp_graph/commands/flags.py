"""Flags of the command line, made from the fields of Config: a new field needs no line here.

field of Config                     flag
x: float | int | str                --x VALUE
x: bool                             --x / --no-x
x: tuple[str, ...]                  --x VALUE,VALUE or repeated
anything else                       --x TEXT, read as a Python literal, else as text

What a field means is read from the docstring of Config, `name: meaning` under `Attributes:`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Union

import typer

from passes.errors import ConfigError

from ..config import Config

PANEL = "Pruning (fields of fasp_graph.Config)"


def with_config_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command(..., **flags)` with one named parameter for each field of Config."""
    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    added = config_parameters({parameter.name for parameter in own})
    # Typer reads the signature for the order and the annotations for the types.
    parameters = [*own, *added]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def config_parameters(taken: set[str]) -> list[inspect.Parameter]:
    """A keyword parameter for each field of Config; None means not given."""
    hints, docs = typing.get_type_hints(Config), field_docs(Config.__doc__ or "")
    return [
        inspect.Parameter(
            held.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(held, hints[held.name], docs.get(held.name, ""), taken),
        )
        for held in fields(Config)
    ]


def field_docs(text: str) -> dict[str, str]:
    """The `name: meaning` lines under `Attributes:`; lines that are indented deeper go on."""
    _, _, listed = inspect.cleandoc(text).partition("Attributes:\n")
    items = re.split(r"^    (\w+): ", listed, flags=re.MULTILINE)[1:]
    meanings = (" ".join(meaning.split()) for meaning in items[1::2])
    return dict(zip(items[::2], meanings, strict=True))


def _annotation(held: Field[Any], hint: Any, text: str, taken: set[str]) -> Any:
    if held.name in taken:
        raise TypeError(f"the flag of Config.{held.name} would hide an argument of the command")
    kind = _plain(hint)
    flag = f"--{held.name.replace('_', '-')}"
    names = (f"{flag}/--no-{flag[2:]}",) if kind is bool else (flag,)
    option = typer.Option(
        *names, help=text, rich_help_panel=PANEL, show_default=_default(held.default)
    )
    return Annotated[kind | None, option]


def _default(value: Any) -> bool | str:
    """A field's default as --help tells it; False: it has none to tell."""
    if value is None:
        return False
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(hint: Any) -> Any:
    """The type that the command line reads for an annotation of Config."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return _plain(kinds[0]) if len(kinds) == 1 else str
    if typing.get_origin(hint) is tuple:
        return list[typing.get_args(hint)[0]]  # type: ignore[misc]
    return hint if hint in (str, int, float, bool) else str


def given_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, in the types of Config."""
    hints = typing.get_type_hints(Config)
    return {
        name: _value(hints[name], value)
        for name, value in flags.items()
        if value is not None and value != []
    }


def _value(hint: Any, value: Any) -> Any:
    if isinstance(value, list):
        return _listed(value)
    if not isinstance(value, str) or _plain(hint) is not str or hint in (str, str | None):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _listed(value: Any) -> Any:
    """A tuple; of texts, the parts between commas."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return tuple(value) if isinstance(value, list) else value
    return tuple(part.strip() for text in texts for part in text.split(","))


def config_from(path: Path | None, flags: Mapping[str, Any]) -> Config:
    """Config of a TOML file's keys, overruled by the flags that were given."""
    found = read_toml(path) if path is not None else {}
    return Config(**found | given_flags(flags))


def read_toml(path: Path) -> dict[str, Any]:
    """The options in a TOML file; a key that Config has not is an error that names the nearest."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror or error} · help: --config takes a TOML file"
        ) from error
    except (ValueError, RecursionError) as error:  # TOML's and the text's errors are ValueErrors
        raise ConfigError(
            f"{path} is not TOML: {error} · help: one option a line, say sparsity = 0.3"
        ) from error
    options = {key.replace("-", "_"): value for key, value in found.items()}
    default = {held.name: held.default for held in fields(Config)}
    unknown = [key for key in options if key not in default]
    if unknown:
        what, way_out = _unknown(unknown[0], options)
        raise ConfigError(f"{path} sets {unknown[0]!r}, {what} · help: {way_out}")
    several = [key for key in options if isinstance(default[key], tuple)]
    return options | {key: _listed(options[key]) for key in several}


def _unknown(key: str, options: Mapping[str, Any]) -> tuple[str, str]:
    """What is wrong with a key of a file that no field of Config has, and the way out."""
    if isinstance(options[key], dict):
        return "a table", "options stand alone, say sparsity = 0.3, under no [heading]"
    names = [held.name for held in fields(Config)]
    near = difflib.get_close_matches(key, names, 1, cutoff=0.75)
    if near:
        return "which no option has", f"try {near[0]}"
    known = ", ".join(name.replace("_", "-") for name in names)
    return "which no option has", f"try {known}; all others are flags only"
