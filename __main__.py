"""`python -P -m diphase` is the command `diphase`."""

from __future__ import annotations

import sys

from .cluster.cli import main

if __name__ == "__main__":
    sys.exit(main())
