"""Network namespaces with links between them that tests make slow and take down. That takes the right to make
them; `Refused` says why there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
"""Not every user's has the folders of network tools."""


class Refused(Exception):
    """This process may not make network namespaces, or has no tools for them."""


def run(*command: str) -> None:
    environment = {**os.environ, "PATH": PATH}
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)


def ip(*args: str) -> None:
    run("ip", *args)


def subnet() -> str:
    """The first three bytes of addresses that belong to this process: test runs beside each other share a
    machine."""
    pid = os.getpid()
    return f"10.{200 + pid // 256 % 50}.{pid % 256}"


@contextmanager
def namespaces(*names: str) -> Iterator[list[str]]:
    """Namespaces for as long as the block lasts, each with its loopback up; their names, drawn from `names`.

    Raises:
        Refused: they may not be made here.
    """
    if shutil.which("tc", path=PATH) is None:
        raise Refused("no links can be made slow here: tc (iproute2) is not installed")
    made: list[str] = []
    try:
        try:
            for name in names:
                made_name = f"diphase-{os.getpid()}-{name}"
                ip("netns", "add", made_name)
                made.append(made_name)
                ip("-n", made_name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or error
            raise Refused(f"no network namespaces may be made here: {why}") from error
        yield made
    finally:
        for name in made:
            ip("netns", "delete", name)


def device(*args: str, of: str | None) -> None:
    """`ip` in a namespace; None: in this process's own."""
    ip(*(("-n", of) if of else ()), *args)


def join(first: str | None, second: str | None, link: str, addresses: tuple[str, str]) -> None:
    """A pair of devices `link`-0 in the first namespace and `link`-1 in the second, with these addresses
    (10.0.0.1/24)."""
    into = second or str(os.getpid())
    device("link", "add", f"{link}-0", "type", "veth", "peer", "name", f"{link}-1", "netns", into, of=first)
    for i, name in enumerate((first, second)):
        device("addr", "add", addresses[i], "dev", f"{link}-{i}", of=name)
        device("link", "set", f"{link}-{i}", "up", of=name)


def shape(name: str, device_name: str, rate: str) -> None:
    """Nothing leaves through the device faster than `rate` (400mbit)."""
    run(*f"tc -n {name} qdisc replace dev {device_name} root tbf rate {rate} burst 256k latency 50ms".split())
