"""Hardware files: what a GPU and its node can do, as the roofline and the topology ask. Knows no model.

A file is TOML with the keys of Hardware. Those of this package are named by their file's stem.
"""

from __future__ import annotations

import os
import reprlib
from dataclasses import dataclass, fields
from pathlib import Path

from ...proto.errors import ConfigError
from ..config_reader import Source, build, read_file

FOLDER = Path(__file__).with_suffix("")
MOST_MEMORY_GIB = 4096
LEAST, MOST = 1e-3, 1e9
"""Of every number, in its unit: beyond them a step or a hand-off takes an age, or no time."""
MOST_HANDOFF_S = 60.0
MOST_PRICE = 1e6
"""Dollars an hour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a placement is laid over: GPUs, or whatever a worker takes, in nodes, and the links between them,
    in one direction, for each GPU; giga is 10^9."""

    name: str
    intra_node_gb_per_s: float
    """To the other GPUs of the node."""
    inter_node_gb_per_s: float
    """To GPUs of other nodes."""
    gpus_per_node: int
    link_share: float = 0.8
    """Of a link's bandwidth that a hand-off gets."""
    handoff_s: float = 0.002
    """Of a hand-off, beside its bytes."""
    node_gb_per_s: float | None = None
    """Out of a node, and into it, for all of its GPUs together; absent: as much as their ports together."""
    nodes_per_rack: int | None = None
    """Absent: all nodes are in one."""
    rack_gb_per_s: float | None = None
    """Out of a rack, and into it, for all of its nodes together; given with nodes_per_rack."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("name is empty; it must say what the hardware is")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("name", "handoff_s") or value is None:
                continue
            if not value > 0.0:
                raise ConfigError(f"{item.name} is {value}; it must be above 0")
            if not LEAST <= value <= MOST:
                raise ConfigError(f"{item.name} is {value:g} and out of range; use {LEAST:g} to {MOST:g}")
        if not 0.0 < self.handoff_s <= MOST_HANDOFF_S:
            raise ConfigError(
                f"handoff_s is {self.handoff_s}; use more than 0, and at most {MOST_HANDOFF_S:g} s"
            )
        if self.link_share > 1.0:
            raise ConfigError(f"link_share is {self.link_share:g}; it is a share of the link, at most 1")
        if (self.nodes_per_rack is None) != (self.rack_gb_per_s is None):
            raise ConfigError("nodes_per_rack and rack_gb_per_s describe racks together; give both or none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware(Node):
    """One GPU and the node it is in. Peak values of the data sheet; gibi is 2^30."""

    bf16_tflops: float
    """Of the matrix units, bfloat16, dense; 10^12 operations a second."""
    hbm_gb_per_s: float
    memory_gib: float
    power_w: float
    """Of the GPU at its limit."""
    price_per_hour: float | None = None
    """US dollars; absent where no published price is at hand."""
    fp8_tflops: float | None = None
    """As bf16_tflops, 8-bit floating point; absent where the GPU has none."""

    def __post_init__(self) -> None:
        Node.__post_init__(self)
        if self.memory_gib > MOST_MEMORY_GIB:
            raise ConfigError(
                f"memory_gib is {self.memory_gib:g}; a GPU has at most {MOST_MEMORY_GIB} GiB here"
            )
        if self.price_per_hour is not None:
            check_price("price_per_hour", self.price_per_hour)


def check_price(what: str, dollars: float) -> None:
    """
    Raises:
        ConfigError: nobody pays so much, or so little, for an hour of a GPU.
    """
    if not LEAST <= dollars <= MOST_PRICE:
        raise ConfigError(f"{what} is {dollars:g}; use {LEAST:g} to {MOST_PRICE:,.0f} dollars an hour")


def known_hardware() -> list[str]:
    """Names of the files of this package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_hardware(name_or_path: str) -> Hardware:
    """A file of this package by its name, or any other by its path.

    Raises:
        ConfigError: there is no such file, or it has an unknown, missing or impossible value.
    """
    path = FOLDER / f"{name_or_path}.toml" if name_or_path in known_hardware() else Path(name_or_path)
    if not os.path.isfile(path):  # Path's own raises where a name is too long
        raise ConfigError(
            f"no hardware is called {reprlib.repr(name_or_path)} and no such file exists; "
            f"use one of {', '.join(known_hardware())}, or the path of a TOML file with the same keys"
        )
    return build(Hardware, read_file(path), Source(str(path)))
