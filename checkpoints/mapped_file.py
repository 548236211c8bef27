"""A file mapped into memory, for the readers of model files. Knows no format."""

from __future__ import annotations

import mmap
from pathlib import Path

from ..proto.errors import CheckpointError


def map_file(path: Path) -> mmap.mmap:
    """The whole file. What is made of the mapping keeps it alive.

    Raises:
        CheckpointError: the file cannot be opened, is empty, or is a pipe or a device.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{path} cannot be opened: it does not exist or is no regular file")
        with path.open("rb") as file:
            # Copy-on-write: arrays on it are writable for their users and the file never changes.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
