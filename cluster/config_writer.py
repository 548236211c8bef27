"""A configuration as TOML with each field's docstring as comment; secrets are left out. Knows no section."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from .config_reader import REDACTED, Drawn

WIDTH = 110
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")
_URL_PASSWORD = re.compile(r"(://[^:@/?#]*:)[^/?#]+(?=@)|([?&]password=)[^&#]+")


def to_toml(config: Any, hidden: Collection[str] = ()) -> str:
    """The dataclass `config` as TOML text that the reader takes back, secrets apart: those are comments, and
    the reader refuses an address whose password is redacted. What was drawn is printed as left open.

    Args:
        hidden: dotted paths to leave out.
    """
    return "\n".join(_table(config, "", hidden)).strip() + "\n"


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line; bases come first."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            docs.update(_own_docs(base))
    return docs


def _own_docs(cls: type[Any]) -> dict[str, str]:
    docs: dict[str, str] = {}
    try:
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError):  # installed without sources
        return docs
    assert isinstance(definition, ast.ClassDef)
    for item, following in zip(definition.body, definition.body[1:], strict=False):
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[item.target.id] = " ".join(str(following.value.value).split())
    return docs


def _table(config: Any, path: str, hidden: Collection[str]) -> Iterator[str]:
    """Lines of one section: first its own keys, then its sub-sections."""
    sections: list[tuple[str, Any]] = []
    yield from _keys(config, path, hidden, sections)
    for name, section in sections:
        yield ""
        yield from _comment(inspect.getdoc(type(section)) or "")
        yield f"[{name}]"
        yield from _table(section, name, hidden)


def _keys(config: Any, path: str, hidden: Collection[str], sections: list[tuple[str, Any]]) -> Iterator[str]:
    docs = field_docs(type(config))
    for item in fields(config):
        value = getattr(config, item.name)
        name = f"{path}.{item.name}" if path else item.name
        if item.metadata.get("flatten"):
            yield from _keys(value, path, hidden, sections)
        elif is_dataclass(value):
            sections.append((name, value))
        elif name in hidden:
            continue
        else:
            yield from _comment(f"{docs.get(item.name, '')} {_choices(item.metadata)}")
            yield _line(item.name, value, secret=bool(item.metadata.get("secret")))


def _choices(metadata: Mapping[str, Any]) -> str:
    """The names that a field marked with them may have, which are written down in one place only."""
    choices = metadata.get("choices", ())
    return f"Names: {', '.join(choices)}." if choices else ""


def _line(name: str, value: Any, *, secret: bool) -> str:
    if isinstance(value, Drawn):
        return f'{name} = ""'
    if secret and value:
        return f"# {name} is set and not shown; the reader of this text has to set it again"
    return f"# {name} =" if value is None else f"{name} = {_value(value)}"


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(" ".join(text.split()), WIDTH - 2):
        yield f"# {line}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(_URL_PASSWORD.sub(rf"\1\2{REDACTED}", value), ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _key(key: str) -> str:
    return key if _BARE_KEY.match(key) else json.dumps(key, ensure_ascii=False)
