"""TOML tables to frozen dataclasses, strictly: the generic half of configuration, which knows no section.

Unknown keys and wrong types are ConfigErrors that name the file (or the `--set`), the key's path and the
nearest key. A field marked with `FLATTEN` holds a dataclass whose keys stand in its owner's table.
"""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from ..proto.errors import ConfigError

T = TypeVar("T")

FLATTEN: Mapping[str, object] = {"flatten": True}
"""Field metadata: the field's keys stand in the table of its owner."""
SECRET: Mapping[str, object] = {"secret": True}
"""Field metadata: never printed."""
LARGEST: Mapping[object, int] = {int: 2**31 - 1, float: 10**14}
"""No number of a configuration may be larger, nor smaller than its negative, by its type: what fits every
integer of the protocol and of C, and what Ray counts of a resource (of memory, bytes). Sections narrow this
down."""
REDACTED = "<redacted>"
"""What stands for a password in a printed address. No value that is read may hold it: whoever copied it would
have it for a password."""


class Drawn(str):
    """A value that was left open and drawn for this start alone; printed as left open."""

    __slots__ = ()


@dataclass(slots=True)
class Source:
    """Where values come from, for messages."""

    file: str
    option: str = "--set"
    """Of the command line, that overrides it."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Dotted path to the option with its text that gave it."""
    given: Mapping[str, object] = field(default_factory=dict)
    """Dotted path to a value that the program sets itself; the key is unknown to the file."""

    def of(self, path: str) -> str:
        best = max(
            (key for key in self.overrides if _inside(path, key) or _inside(key, path)), key=len, default=""
        )
        return self.overrides.get(best, self.file)

    def gives_in(self, path: str) -> bool:
        """Whether a value inside that section is given."""
        return any(_inside(key, path) for key in self.given)


def _inside(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith((f"{prefix}.", f"{prefix}["))


def read_file(path: Path) -> dict[str, Any]:
    """The table of a TOML file.

    Raises:
        ConfigError: it cannot be read or is not TOML; the message names the line.
    """
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise ConfigError(f"{path}: is not valid TOML: {exc}") from exc


def apply_overrides(table: dict[str, Any], settings: Iterable[str], source: Source) -> None:
    """Puts each "section.key=value" into `table`. A value is TOML, or else taken as a bare string.

    Raises:
        ConfigError: a setting has no "=", its path runs through a value that is no table, or its value is
            beyond what is read.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        path = path.strip()
        if not equals or not all(path.split(".")):
            raise ConfigError(f"{source.option} {setting}: write it as section.key=value")
        *parents, last = path.split(".")
        target = table
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{source.option} {setting}: {parent} is a value, not a section")
        try:
            target[last] = parse_value(text.strip())
        except ValueError as exc:
            raise ConfigError(f"{source.option} {path}=...: {exc}") from exc
        source.overrides[path] = f"{source.option} {setting}"


def _parse(text: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is beyond what is read; tomllib.TOMLDecodeError, which is one: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except ValueError:  # Python's limit, in words for a programmer
        raise ValueError("it holds an integer of thousands of digits") from None


def parse_value(text: str) -> object:
    """A TOML value; what is not one (or is a date) is a bare string.

    Raises:
        ValueError: it is beyond what is read.
    """
    try:
        value = _parse(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if set(value) != {"value"} or not isinstance(value["value"], (bool, int, float, str, list, dict)):
        return text
    return value["value"]


def build(cls: type[T], table: Mapping[str, Any], source: Source, path: str = "") -> T:
    """An instance of the dataclass `cls` from `table`; what is absent takes its default.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing key, or a value that `cls` refuses.
    """
    known = [key for key in keys_of(cls) if _join(path, key) not in source.given]
    for key in table:
        if key not in known:
            raise ConfigError(f"{source.of(_join(path, key))}: {_unknown(path, key, known)}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in _init_fields(cls):
        hint = hints[item.name]
        if _join(path, item.name) in source.given:
            values[item.name] = source.given[_join(path, item.name)]
        elif item.metadata.get("flatten"):
            inner = keys_of(hint)
            values[item.name] = build(hint, {k: v for k, v in table.items() if k in inner}, source, path)
        elif item.name in table or (is_dataclass(hint) and source.gives_in(_join(path, item.name))):
            values[item.name] = _convert(hint, table.get(item.name, {}), source, _join(path, item.name))
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{source.of(path)}: {_join(path, item.name)} is missing")
    try:
        return cls(**values)
    except ConfigError as exc:
        raise ConfigError(_placed(source, path, exc.message)) from exc


def section(cls: type[T], table: Mapping[str, Any], name: str, source: Source) -> T:
    """`build` of the section `name` of the whole table."""
    value: T = _convert(cls, table.get(name, {}), source, name)
    return value


def keys_of(cls: type[Any]) -> dict[str, Field[Any]]:
    """The keys that a table of `cls` may have, those of flattened fields included."""
    hints = typing.get_type_hints(cls)
    found: dict[str, Field[Any]] = {}
    for item in _init_fields(cls):
        if item.metadata.get("flatten"):
            found.update(keys_of(hints[item.name]))
        else:
            found[item.name] = item
    return found


def _init_fields(cls: type[Any]) -> list[Field[Any]]:
    return [item for item in fields(cls) if item.init]


def _unknown(path: str, key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    what = f"unknown key {_join(path, key)}"
    return (
        f"{what}; did you mean {_join(path, near[0])}?" if near else f"{what}; known are {', '.join(known)}"
    )


def _placed(source: Source, path: str, message: str) -> str:
    """The message of a dataclass, which may name the key's whole path or not know in which section it
    stands."""
    named = message.partition(" ")[0]
    if "." in named or not path:
        return f"{source.of(named)}: {message}"
    return f"{source.of(path)}: [{path}] {message}"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _convert(hint: Any, value: Any, source: Source, path: str) -> Any:
    origin = typing.get_origin(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise _wrong(source, path, "a table", value)
        return build(hint, value, source, path)
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, source, path)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices or isinstance(value, bool):
            raise _wrong(source, path, "one of " + ", ".join(map(repr, choices)), value)
        return value
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise _wrong(source, path, f"an array{_like(value, source.of(path))}", value)
        item = typing.get_args(hint)[0]
        items = [_convert(item, entry, source, f"{path}[{i}]") for i, entry in enumerate(value)]
        return items if origin is list else tuple(items)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _wrong(source, path, "a table", value)
        item = typing.get_args(hint)[1]
        return {key: _convert(item, entry, source, _join(path, key)) for key, entry in value.items()}
    return _convert_scalar(hint, value, source, path)


def _like(value: object, given: str) -> str:
    """How the array would be written that was probably meant: its elements alone, or in brackets whose
    quotes a shell took away."""
    if isinstance(value, (int, float)) and abs(value) <= LARGEST[int]:
        return f" like {json.dumps([value])}"
    if not isinstance(value, str) or len(value) > 80:
        return ""
    array = json.dumps([word.strip() for word in value.strip("[]").split(",")], ensure_ascii=False)
    in_shell = f" (in a shell: {given.partition('=')[0]}='{array}')" if given.startswith("--") else ""
    return f" like {array}{in_shell}"


def _convert_union(choices: tuple[Any, ...], value: Any, source: Source, path: str) -> Any:
    if type(None) in choices and value == "none":
        return None
    errors: list[ConfigError] = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _convert(choice, value, source, path)
        except ConfigError as exc:
            errors.append(exc)
    if len(errors) == 1:
        raise errors[0]
    raise _wrong(source, path, " or ".join(_name(choice) for choice in choices), value)


def _convert_scalar(hint: Any, value: Any, source: Source, path: str) -> Any:
    if hint in LARGEST and isinstance(value, (int, float)) and not abs(value) <= LARGEST[hint]:
        raise _wrong(source, path, f"{_name(hint)} from {-LARGEST[hint]} to {LARGEST[hint]}", value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and REDACTED in value:
        raise ConfigError(
            f"{source.of(path)}: {path} holds {REDACTED}, which `diphase config` prints in place of a "
            "password; write the password itself"
        )
    if (
        hint in (bool, int, float, str)
        and isinstance(value, hint)
        and (hint is bool or not isinstance(value, bool))
    ):
        return value
    raise _wrong(source, path, _name(hint), value)


def _name(hint: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "none"}
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return names.get(hint, str(hint))


def _wrong(source: Source, path: str, wanted: str, value: object) -> ConfigError:
    try:
        shown = repr(value) if not isinstance(value, bool) else str(value).lower()
    except (ValueError, RecursionError):  # a hexadecimal integer or a dotted key may have any length
        shown = "what is given, which is too large to be shown"
    return ConfigError(f"{source.of(path)}: {path} must be {wanted}, not {shown[:80]}")
