"""What may change in a running cluster's configuration: how its workers compute and hand over, nothing that
gateways, places or other clusters know of."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from ..proto.errors import ConfigError
from .config import GIVEN, ClusterConfig, PlacementConfig, PoolsConfig, given
from .config_reader import Source, apply_overrides, build, keys_of
from .config_writer import to_toml

WORKERS_OWN = ("engine", "host", "kv_transfer", "pools")
KEPT = ("name", "store.url", "security.cluster_token")
"""Not written down again: drawn, or secret."""


def changed(config: ClusterConfig, settings: Sequence[str]) -> ClusterConfig:
    """`config` with `settings` ("section.key=value") of workers' sections.

    Raises:
        ConfigError: a setting is wrong, or not one that new workers beside old ones may have.
    """
    if not settings:
        return config
    source = Source("the running configuration", option="--with")
    table: dict[str, Any] = tomllib.loads(to_toml(config, hidden=(*GIVEN, *KEPT)))
    apply_overrides(table, settings, source)
    for path in source.overrides:  # what is not known to the table, as the token, would not show below
        section = path.partition(".")[0]
        if section not in WORKERS_OWN and section in keys_of(ClusterConfig):
            raise ConfigError(
                f"{section}: a restart changes workers only, by settings of "
                f"{', '.join(WORKERS_OWN)}; for others start the cluster again"
            )
    source.given = given(config.model, config.security.cluster_token)
    new = build(ClusterConfig, table, source)
    new = replace(new, name=config.name, store=config.store, security=config.security)
    for pool in fields(PoolsConfig):
        _check_placement(
            pool.name, getattr(config.pools, pool.name).placement, getattr(new.pools, pool.name).placement
        )
    return new


def _check_placement(pool: str, before: PlacementConfig, wanted: PlacementConfig) -> None:
    """
    Raises:
        ConfigError: they differ.
    """
    for key in fields(PlacementConfig):
        if getattr(before, key.name) != getattr(wanted, key.name):
            how = (
                f"`diphase scale {pool} {wanted.workers}` does that"
                if key.name == "workers"
                else "it needs a new start of the cluster"
            )
            raise ConfigError(
                f"pools.{pool}.{key.name}: a restart leaves how many workers there are, and what each takes, "
                f"as it is; {how}"
            )
