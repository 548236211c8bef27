"""A second engine on this machine: it computes steps of one kind until it is told another, for a profile of
what workers cost each other, or times its steps, to know how fast the machine is just now (profiler.py). It
serves nobody.

Started as `python -P -m diphase.engine.neighbour`; the first line of its input is its EngineConfig and its
cores as JSON, each further one a kind of step, "idle" or "time". It answers each with the same word once it
does that, and ends with its input. After "time" come the cores for each kind of step as JSON, and the answer
is their times.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from io import RawIOBase

from ..proto.clock import MonotonicClock
from ..proto.errors import InternalError
from .base import Engine
from .config import EngineConfig
from .profiler import IDLE, run_steps, time_references

READY, TIME = "ready", "time"


def main() -> int:
    # Unbuffered: what Python has read ahead, select() would not show.
    with os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0) as told:
        first = json.loads(told.readline())
        if first["cores"]:
            os.sched_setaffinity(0, first["cores"])
        from .engine import TorchEngine

        engine = TorchEngine.load(EngineConfig(**first["engine"]))
        try:
            serve(engine, told)
        finally:
            engine.close()
    return 0


def serve(engine: Engine, told: RawIOBase) -> None:
    """Does what its input says until that ends."""
    _say(READY)
    while line := told.readline():
        kind, _, more = line.decode().strip().partition(" ")
        if kind == TIME:
            _say(json.dumps(time_references(engine, MonotonicClock(), _mover(json.loads(more)))))
            continue
        _say(kind)
        if kind != IDLE:
            run_steps(engine, kind, lambda: not select.select([told], [], [], 0)[0])


def _mover(cores: dict[str, list[int]]) -> Callable[[str], None]:
    """Moves this thread to the cores of a kind of step."""

    def move(kind: str) -> None:
        if cores[kind]:
            os.sched_setaffinity(0, cores[kind])

    return move


def _say(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


class Neighbour:
    """The process, as who started it sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, kind: str) -> None:
        """Has it compute that kind of step, or nothing; returns when it does.

        Raises:
            InternalError: it has ended.
        """
        self._write(kind)
        self.expect(kind)

    def time(self, cores: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Seconds that steps of profiler.REFERENCE_CELLS take it now, by kind, each on cores of its own
        (empty: where it is); it idles afterwards.

        Raises:
            InternalError: it has ended.
        """
        self._write(f"{TIME} {json.dumps({kind: list(own) for kind, own in cores.items()})}")
        answer = self._read()
        if not answer.startswith("{"):
            raise InternalError(f"the second engine said {answer!r} instead of its times")
        return {kind: float(seconds) for kind, seconds in json.loads(answer).items()}

    def expect(self, word: str) -> None:
        """
        Raises:
            InternalError: it says something else, or has ended.
        """
        if (said := self._read()) != word:
            raise InternalError(f"the second engine said {said!r} instead of {word!r}")

    def _write(self, word: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says it

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def neighbour(config: EngineConfig, cores: Sequence[int]) -> Iterator[Neighbour]:
    """Starts one on `cores`, yields it when it has loaded its model, and ends it.

    Raises:
        InternalError: it ended before; its own words are on standard error.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", f"{__package__}.neighbour"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:  # closes its input at the end, which ends it, and waits
        assert process.stdin is not None
        process.stdin.write(json.dumps({"engine": asdict(config), "cores": list(cores)}) + "\n")
        process.stdin.flush()
        found = Neighbour(process)
        found.expect(READY)
        yield found


if __name__ == "__main__":
    sys.exit(main())
