"""Runs tests of Triton kernels in Triton's interpreter, in a process of its own: TRITON_INTERPRET counts when
a kernel is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def check_interpreted(name: str) -> None:
    """Every test of the module `name` beside this one holds there."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", str(Path(__file__).with_name(name))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
