"""CSV and JSON tables of measurements: where they lie, and rows with errors that name file and line.

Knows no table's meaning.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...proto.errors import ConfigError
from ..load.traces import DATA_VARIABLE

T = TypeVar("T")


def existing(folder: Path, name: str, source: str) -> Path:
    """The file `name` below the data folder.

    Raises:
        ConfigError: it is not there; the message says where to get it.
    """
    path = folder / name
    if not path.is_file():
        raise ConfigError(
            f"step times need the file {path}; get it from {source} and put it there, or name the folder "
            f"that has {name} with {DATA_VARIABLE}"
        )
    return path


def read_rows(path: Path, convert: Callable[[Mapping[str, str]], T]) -> Iterator[T]:
    """Each row of a CSV with a header, by `convert`.

    Raises:
        ConfigError: a row lacks a column (`convert` raises KeyError) or has a value that is none (TypeError,
            ValueError).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    reader = csv.DictReader(io.StringIO(text, newline=""))
    while True:
        try:
            yield convert(next(reader))
        except StopIteration:
            return
        except (KeyError, TypeError, ValueError, csv.Error) as exc:
            what = f"lacks the column {exc}" if isinstance(exc, KeyError) else f"is malformed: {exc}"
            raise ConfigError(f"{path}, line {reader.line_num} {what}") from exc


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return value


def positive_number(text: str) -> float:
    """
    Raises:
        ValueError: it is no number above zero.
    """
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{text} where a number above 0 is expected")
    return value


def positive_int(text: str) -> int:
    """
    Raises:
        ValueError: it is no whole number above zero.
    """
    value = int(text)
    if value < 1:
        raise ValueError(f"{text} where a whole number above 0 is expected")
    return value


def missing(what: str, asked: object, there: Iterable[object]) -> ConfigError:
    """The error for something that a table does not have."""
    names = ", ".join(str(name) for name in sorted(set(there), key=str))
    return ConfigError(f"{what} {asked} was not measured; there is {names or 'nothing'}")
