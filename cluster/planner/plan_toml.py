"""A placement as the configuration of a cluster: what `diphase serve --config` takes. Knows no simulation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ...proto.errors import ConfigError
from .goodput import ROUTER, Objectives
from .machines import Machine, RooflineMachine
from .model_shape import KNOWN_MODELS
from .placement import Placement, Pool, scheduler_of
from .profile_machine import ProfileMachine

REPOSITORIES = {
    "opt-13b": "facebook/opt-13b",
    "opt-66b": "facebook/opt-66b",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-70b": "meta-llama/Llama-3.1-70B",
    "qwen3-32b": "Qwen/Qwen3-32B",
}
"""Where the Hub has the models that are known by name."""

_SETTINGS = {
    "prefill": ("chunk_budget", "saturation_tokens"),
    "decode": ("max_running",),
    "colocated": ("max_running", "prefill_budget"),
}


def served_name(model: str) -> str:
    """What [model] calls the model that the plan was asked for: a config.json's folder, or its repository.

    Raises:
        ConfigError: it is known by name, but no repository has its weights in a form that is served.
    """
    if model in KNOWN_MODELS and model not in REPOSITORIES:
        raise ConfigError(
            f"no repository is known for {model}; plan for the folder of its weights and config.json"
        )
    path = Path(model)
    if path.exists():
        return str(path.parent if path.is_file() else path)
    return REPOSITORIES.get(model, model)


class TomlPool(NamedTuple):
    """A pool of the configuration."""

    pool: Pool
    machine: Machine
    resource: str = ""
    """Ray resource that the pool's nodes offer, one for each GPU; empty: any node will do."""


def plan_toml(
    placement: Placement,
    machine: Machine,
    objectives: Objectives,
    model: str,
    policy: str = ROUTER.policy,
) -> str:
    """
    Raises:
        ConfigError: a worker has pipeline stages, or weights or KV in fp8, which this cluster's workers do
            not know; or no repository is known for the model.
    """
    return cluster_toml(
        [f"# Planned: {placement}; {placement.gpus} GPUs ({machine.hardware.name})."],
        {role: TomlPool(pool, machine) for role, pool in placement.pools()},
        objectives=objectives,
        model=model,
        policy=policy,
    )


def cluster_toml(
    heading: Sequence[str],
    pools: Mapping[str, TomlPool],
    *,
    objectives: Objectives,
    model: str,
    policy: str,
) -> str:
    """Pools by role, as `diphase serve --config` takes them.

    Raises:
        ConfigError: a worker has pipeline stages, or weights or KV in fp8, which this cluster's workers do
            not know; or no repository is known for the model.
    """
    for role, (pool, machine, _) in pools.items():
        if isinstance(machine, RooflineMachine) and {machine.precision, machine.kv_precision} != {"bf16"}:
            raise ConfigError(
                f"the plan is for weights in {machine.precision} and KV in {machine.kv_precision}, and this "
                "cluster's workers have both in bf16; plan with --precision bf16 and --kv-precision bf16 for "
                "a configuration"
            )
        if pool.parallel.pp > 1:
            raise ConfigError(
                f"the {role} workers have pp = {pool.parallel.pp} and this cluster's workers have no "
                "pipeline stages; plan with --max-pp 1 for a configuration"
            )
    lines = [*heading, "", *_engine(next(iter(pools.values())).machine, model)]
    for role in ("prefill", "decode", "colocated"):
        lines += ["", f"[pools.{role}]", f"workers = {pools[role].pool.count if role in pools else 0}"]
        if role not in pools:
            continue
        pool, machine, resource = pools[role]
        lines += [f"tensor_parallel = {pool.parallel.tp}", *_resources(pool, machine)]
        if resource:
            lines.append(f"resources = {{ {json.dumps(resource)} = {pool.parallel.gpus} }}")
        scheduler = scheduler_of(role, pool, machine)
        lines += [f"{name} = {getattr(scheduler, name)}" for name in _SETTINGS[role]]
    lines += [
        "",
        "[router]",
        f"policy = {json.dumps(policy)}",
        "local_prefill_tokens = 0  # as it was simulated",
        "",
        "[slo]",
        f"ttft_ms = {float(objectives.ttft_ms)!r}",
        f"tpot_ms = {float(objectives.tpot_ms)!r}",
    ]
    return "\n".join(lines) + "\n"


def _engine(machine: Machine, model: str) -> list[str]:
    """[model] and [engine]: of a profile the settings that it was made with."""
    if isinstance(machine, ProfileMachine):
        engine = machine.profile.engine
        return [
            "[model]",
            f"name = {json.dumps(engine.model)}",
            f"dtype = {json.dumps(engine.dtype)}",
            "",
            "[engine]",
            f"block_size = {engine.block_size}",
            f"kv_cache_mib = {engine.kv_cache_mib}",
            f"threads = {engine.threads}",
        ]
    return [
        "[model]",
        f"name = {json.dumps(served_name(model))}",
        "",
        "[engine]",
        f"block_size = {machine.limits.block_size}",
    ]


def _resources(pool: Pool, machine: Machine) -> list[str]:
    """What each worker takes of its node, and its memory where [engine] does not say it."""
    if isinstance(machine, ProfileMachine):
        return [f"cpus = {machine.profile.engine.threads}"]
    kv_mib = max(1, machine.kv_tokens(pool.parallel) * machine.kv_bytes_per_token >> 20)
    return [f"gpus = {pool.parallel.gpus}", f"kv_cache_mib = {kv_mib}"]
