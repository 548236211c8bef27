"""A file mapped into memory, for the readers of model files. Knows no format."""

from __future__ import annotations

import mmap
from pathlib import Path

from ..proto.errors import CheckpointError


def map_file(path: Path) -> mmap.mmap:
    """The whole file. What is made of the mapping keeps it alive.

    Raises:
        CheckpointError: the file cannot be opened, or is empty.
    """
    try:
        with path.open("rb") as file:
            # Copy-on-write: arrays on it are writable for their users and the file never changes.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
