"""The options of `diphase plan` that speak of several types of GPUs, or of what they take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from ...proto.errors import ConfigError
from .fleet import MEASURES, Budget, GpuType
from .hardware import Hardware
from .machines import Machine

MOST_GPUS = 1024
"""Of a type."""


def add_fleet_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares them on a (sub)parser."""
    fleet = parser.add_argument_group("several types of GPUs (--hardware A,B), or a budget")
    fleet.add_argument(
        "--budget",
        metavar="cost|power[=MOST]",
        help="what is to be small, dollars an hour or watts, and the most of it; with --rate the least that "
        "serves it, else the highest goodput within",
    )
    fleet.add_argument(
        "--prices", metavar="TYPE=DOLLARS,…", help="an hour of a GPU (default: the hardware files')"
    )


def wants_fleet(args: argparse.Namespace) -> bool:
    """Whether the plan is one for several types, or for a budget."""
    return "," in (args.hardware or "") or args.budget is not None


def total_gpus(args: argparse.Namespace) -> int:
    """The most that may be used, of one type.

    Raises:
        ConfigError: it is no number, or prices are given that nothing asks for.
    """
    if args.prices is not None:
        raise ConfigError("--prices is for plans with a --budget; give one, or leave it out")
    try:
        gpus = int(args.gpus)
    except ValueError:
        raise ConfigError(f"--gpus {args.gpus}: for one type of hardware give a whole number") from None
    _check_gpus(args.gpus, gpus)
    return gpus


def gpu_types(args: argparse.Namespace, machine_of: Callable[[str], Machine]) -> tuple[GpuType, ...]:
    """The types that may be used.

    Raises:
        ConfigError: one is unknown, or has no number or no possible one.
    """
    if args.hardware is None:
        raise ConfigError("--budget needs --hardware: types of GPUs with a price or a power")
    names = [name.strip() for name in args.hardware.split(",")]
    if "" in names:
        raise ConfigError(f"--hardware {args.hardware}: a name is empty; write it as h100-sxm,a100-sxm-80gb")
    available = _numbers("--gpus", args.gpus, names, "=" not in args.gpus)
    for name in names:
        if name not in available:
            raise ConfigError(f"--gpus {args.gpus} has none of {name}; write {name}=NUMBER")
        if not available[name].is_integer():
            raise ConfigError(f"--gpus {args.gpus}: {name} = {available[name]:g} is no whole number")
        _check_gpus(args.gpus, available[name])
    prices = {} if args.prices is None else _numbers("--prices", args.prices, names, False)
    types = []
    for name in names:
        machine = machine_of(name)
        known = machine.hardware.price_per_hour if isinstance(machine.hardware, Hardware) else None
        types.append(
            GpuType(
                name=name,
                machine=machine,
                available=int(available[name]),
                price_per_hour=prices.get(name, known),
            )
        )
    return tuple(types)


def _check_gpus(given: str, gpus: float) -> None:
    if gpus > MOST_GPUS:
        raise ConfigError(f"--gpus {given}: plan for at most {MOST_GPUS}; what is larger is several of it")


def budget_of(given: str | None) -> Budget:
    """As in "cost=98", "power=40000" or "cost".

    Raises:
        ConfigError: it is malformed or not above 0, or several types are planned without one.
    """
    if given is None:
        raise ConfigError(
            "several types of hardware need a --budget, such as cost=98 (dollars an hour), power=40000 "
            "(watts), or cost or power alone, without a limit"
        )
    measure, equals, value = given.partition("=")
    if measure not in MEASURES:
        raise ConfigError(f"--budget {given}: write it as cost=98 (dollars an hour) or power=40000 (watts)")
    if not equals:
        return Budget(measure=measure)
    try:
        return Budget(measure=measure, most=float(value))
    except ValueError:
        raise ConfigError(f"--budget {given}: {value!r} is no number of {MEASURES[measure]}") from None


def _numbers(option: str, given: str, names: Sequence[str], plain: bool) -> dict[str, float]:
    """By name: "16" for all of them, where `plain`, or "h100-sxm=16,a100-sxm-80gb=32".

    Raises:
        ConfigError: a name is unknown or named twice, or a value is no number.
    """
    values: dict[str, float] = {}
    for part in [f"{name}={given}" for name in names] if plain else given.split(","):
        name, _, value = part.strip().rpartition("=")
        if name not in names:
            raise ConfigError(f"{option} {given}: {name!r} is not of --hardware {','.join(names)}")
        if name in values and not plain:
            raise ConfigError(f"{option} {given}: {name} is named twice")
        try:
            values[name] = float(value)
        except ValueError:
            raise ConfigError(f"{option} {given}: {name} = {value!r} is no number") from None
    return values
