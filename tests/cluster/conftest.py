"""The published measurements, where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from diphase.cluster.load.traces import data_folder


@pytest.fixture(scope="session")
def data() -> Path:
    """Their folder; tests that need it are skipped only where it does not exist at all."""
    folder = data_folder(None, os.environ)
    if not folder.is_dir():
        pytest.skip(f"no measurements: the folder {folder} does not exist (set DIPHASE_DATA)")
    return folder
