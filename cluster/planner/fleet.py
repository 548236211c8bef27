"""What a fleet is made of: types of GPUs, and the budget that they take of. Knows no search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...proto.errors import ConfigError
from .hardware import Hardware
from .machines import Machine

MEASURES: Mapping[str, str] = {"cost": "$/h", "power": "W"}
"""What a budget may be of, with its unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuType:
    """One model on one kind of GPU, of which there are so many."""

    name: str
    machine: Machine
    available: int
    price_per_hour: float | None = None
    """US dollars a GPU."""

    def __post_init__(self) -> None:
        if not isinstance(self.machine.hardware, Hardware):
            raise ConfigError(
                f"{self.name} is no type of GPU with a price and power; plan it without a budget"
            )
        if self.available < 1:
            raise ConfigError(f"gpus: {self.name} = {self.available}; plan for at least 1 GPU of each type")
        if self.price_per_hour is not None and not 0.0 < self.price_per_hour < math.inf:
            raise ConfigError(f"the price of {self.name} is {self.price_per_hour:g}; use dollars above 0")

    @property
    def hardware(self) -> Hardware:
        """What a data sheet says of it."""
        assert isinstance(self.machine.hardware, Hardware)  # checked
        return self.machine.hardware

    def each(self, measure: str) -> float:
        """What a GPU takes of the budget.

        Raises:
            ConfigError: its price is not known.
        """
        if measure == "power":
            return self.hardware.power_w
        if self.price_per_hour is None:
            raise ConfigError(
                f"{self.name} has no price; give one with --prices {self.name}=DOLLARS_PER_HOUR"
            )
        return self.price_per_hour


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What is to be small, and the most of it."""

    measure: str
    """A key of MEASURES."""
    most: float = math.inf

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ConfigError(f"a budget is of {' or '.join(MEASURES)}, not of {self.measure!r}")
        if not self.most > 0.0:
            raise ConfigError(f"budget: {self.measure} = {self.most:g}; use a number above 0")

    def text(self, value: float) -> str:
        """With its unit."""
        return f"${value:,.2f}/h" if self.measure == "cost" else f"{value:,.0f} W"
