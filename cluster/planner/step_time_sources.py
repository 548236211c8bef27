"""`diphase plan --step-times …`: the options that name a source of step times, and the machine they come to.
Knows no search."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...proto.errors import ConfigError
from .hardware import known_hardware, load_hardware
from .machines import DistServeMachine, Machine, RooflineMachine
from .model_shape import KNOWN_MODELS, load_model_shape
from .profile import load_profile
from .profile_machine import ProfileMachine
from .table_machine import splitwise_machine, step_latency_machine

SOURCES = {
    "roofline": ("hardware", "precision", "kv_precision"),
    "distserve": ("hardware",),
    "splitwise": ("hardware",),
    "step-latency": ("hardware",),
    "profile": ("profile",),
}
"""Where step times come from, with the options that each takes."""
DEFAULT = "roofline"


def add_source_arguments(what: argparse._ArgumentGroup) -> None:
    """Declares the options of model, hardware and step times."""
    what.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help=f"{', '.join(KNOWN_MODELS)}, or a config.json; with a profile the one that it is of",
    )
    what.add_argument(
        "--hardware",
        metavar="HARDWARE",
        help=f"{', '.join(known_hardware())}, or a TOML file with the same keys; several with commas",
    )
    what.add_argument(
        "--step-times", choices=[*SOURCES], default=DEFAULT, help="where they come from (%(default)s)"
    )
    what.add_argument(
        "--profile", type=Path, metavar="FILE", help="of `diphase profile`, for --step-times profile"
    )
    what.add_argument("--precision", choices=("bf16", "fp8"), help="of weights, by roofline (bf16)")
    what.add_argument("--kv-precision", choices=("bf16", "fp8"), help="of KV, by roofline (bf16)")


def machine_from(args: argparse.Namespace, folder: Path) -> Machine:
    """By --step-times, with the options that it takes.

    Raises:
        ConfigError: one is lacking or for another source, or what it names does not fit the others.
    """
    source = args.step_times
    for name in ("hardware", "precision", "kv_precision", "profile"):
        given = getattr(args, name)
        if given is not None and name not in SOURCES[source]:
            option = f"--{name.replace('_', '-')} {given}"
            raise ConfigError(f"{option} is not for --step-times {source}; leave it out")
    for name in ("hardware", "profile"):
        if getattr(args, name) is None and name in SOURCES[source]:
            raise ConfigError(f"--step-times {source} needs --{name}")
    if source == "profile":
        return _profiled(args)
    if source == "splitwise":
        return splitwise_machine(folder, model=args.model, hardware=args.hardware)
    if source == "step-latency":
        return step_latency_machine(folder, model=args.model, hardware=args.hardware)
    model, hardware = load_model_shape(args.model), load_hardware(args.hardware)
    if source == "roofline":
        return RooflineMachine(model, hardware, args.precision or "bf16", args.kv_precision or "bf16")
    if args.hardware != "a100-sxm-80gb":
        raise ConfigError(
            f"--step-times distserve was measured on a100-sxm-80gb, not on {args.hardware}; use that"
        )
    return DistServeMachine(model, hardware, args.model, folder)


def _profiled(args: argparse.Namespace) -> ProfileMachine:
    profile = load_profile(args.profile)
    if profile.engine.model != args.model:
        raise ConfigError(
            f"--profile {args.profile} is of the model {profile.engine.model}, not of {args.model}; "
            f"make one with `diphase profile --model {args.model}`"
        )
    return ProfileMachine(profile, args.gpus)


def source_json(args: argparse.Namespace) -> dict[str, Any]:
    """What a plan was computed of."""
    profile = args.profile and str(args.profile)
    return {
        "model": args.model,
        "step_times": args.step_times,
        "profile": profile,
        "precision": (args.precision or "bf16") if args.step_times == "roofline" else None,
        "kv_precision": (args.kv_precision or "bf16") if args.step_times == "roofline" else None,
    }
