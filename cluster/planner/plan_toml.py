"""A placement as the configuration of a cluster: what `diphase serve --config` takes. Knows no simulation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ...proto.errors import ConfigError
from .deployment import ROLES
from .goodput import ROUTER, Objectives
from .machines import Machine, RooflineMachine
from .model_shape import KNOWN_MODELS
from .placement import Placement, Pool, worker_spec
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


def plan_toml(
    placement: Placement,
    machines: Mapping[str, Machine],
    objectives: Objectives,
    model: str,
    policy: str = ROUTER.policy,
) -> str:
    """Pools by role, as `diphase serve --config` takes them; where types of GPUs differ, a pool's nodes are
    found by a Ray resource that has the type's name.

    Args:
        machines: by the names that the pools have for their hardware.

    Raises:
        ConfigError: a role has workers of several kinds, or workers have pipeline stages, or weights or KV
            in fp8, none of which this cluster knows; or no repository is known for the model.
    """
    pools = {pool.worker.role: pool for pool in placement.pools}
    for role in pools:
        if sum(pool.worker.role == role for pool in placement.pools) > 1:
            raise ConfigError(
                f"the {role} workers are of several kinds and a cluster's configuration has one for "
                f"each role: {placement}"
            )
    for role, pool in pools.items():
        machine, parallel = machines[pool.hardware], pool.worker.parallel
        if isinstance(machine, RooflineMachine) and {machine.precision, machine.kv_precision} != {"bf16"}:
            raise ConfigError(
                f"the plan is for weights in {machine.precision} and KV in {machine.kv_precision}, and this "
                "cluster's workers have both in bf16; plan with --precision bf16 and --kv-precision bf16 for "
                "a configuration"
            )
        if parallel.pp > 1:
            raise ConfigError(
                f"the {role} workers have pp = {parallel.pp} and this cluster's workers have no "
                "pipeline stages; plan with --max-pp 1 for a configuration"
            )
    several = len(placement.hardware) > 1
    machine = machines[placement.pools[0].hardware]
    named = "" if placement.pools[0].hardware else f" ({machine.hardware.name})"
    lines = [f"# Planned: {placement}; {placement.gpus} GPUs{named}."]
    if several:
        lines.append("# A node offers a Ray resource called as its type of GPU, one for each of them.")
    lines += ["", *_engine(machine, model)]
    for role in ROLES:
        lines += ["", f"[pools.{role}]"]
        lines += _pool(pools[role], machines, several) if role in pools else ["workers = 0"]
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


def _pool(pool: Pool, machines: Mapping[str, Machine], several: bool) -> list[str]:
    machine, parallel = machines[pool.hardware], pool.worker.parallel
    lines = [f"workers = {pool.count}", f"tensor_parallel = {parallel.tp}", *_resources(pool, machine)]
    if several:
        lines.append(f"resources = {{ {json.dumps(pool.hardware)} = {parallel.gpus} }}")
    scheduler = worker_spec(pool.worker, machine).scheduler
    return lines + [f"{name} = {getattr(scheduler, name)}" for name in _SETTINGS[pool.worker.role]]


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
    parallel = pool.worker.parallel
    kv_mib = max(1, machine.kv_tokens(parallel) * machine.kv_bytes_per_token >> 20)
    return [f"gpus = {parallel.gpus}", f"kv_cache_mib = {kv_mib}"]
