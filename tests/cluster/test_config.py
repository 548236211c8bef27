from __future__ import annotations

import random
import tomllib
from pathlib import Path

import pytest
from diphase.cluster.config import GIVEN, ClusterConfig, PlacementConfig, load
from diphase.cluster.config_change import changed
from diphase.cluster.config_writer import field_docs, to_toml
from diphase.cluster.roles import Assignment, _worker_config
from diphase.engine.config import EngineConfig
from diphase.proto.errors import ConfigError


def loaded(*settings: str, file: Path | None = None, seed: int = 0) -> ClusterConfig:
    return load(file, settings, random.Random(seed))


def test_the_default_is_one_prefill_and_one_decode_worker_with_the_built_in_model() -> None:
    config = loaded()
    assert {role: pool.workers for role, pool in config.pools.placements().items()} == {
        "prefill": 1,
        "decode": 1,
        "colocated": 0,
    }
    assert config.model.name == config.engine.model == "smollm2"


def test_name_and_token_are_drawn_once_and_every_section_has_the_same_token() -> None:
    config = loaded(seed=7)
    assert config == loaded(seed=7)
    assert config.name != loaded(seed=8).name
    assert config.host.cluster_token == config.security.cluster_token != loaded(seed=8).security.cluster_token
    assert len(config.security.cluster_token) == 64


def test_configured_name_and_token_are_kept() -> None:
    config = loaded("name=blue", "security.cluster_token=secret")
    assert (config.name, config.security.cluster_token, config.host.cluster_token) == (
        "blue",
        "secret",
        "secret",
    )


def test_sections_of_every_folder_are_read_from_one_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(
        """
        [model]
        name = "dummy:tiny"
        dtype = "fp32"
        [engine]
        kv_cache_mib = 64
        [pools.prefill]
        workers = 2
        chunk_budget = 256
        [pools.decode]
        max_running = 8
        [kv_transfer]
        transport = "tcp"
        [router]
        admission = "slo"
        [slo]
        ttft_ms = 500
        """
    )
    config = loaded(file=file)
    assert (config.engine.model, config.engine.dtype, config.engine.kv_cache_mib) == (
        "dummy:tiny",
        "fp32",
        64,
    )
    assert config.pools.prefill.placement.workers == 2
    assert config.pools.prefill.scheduler.chunk_budget == 256
    assert config.pools.decode.scheduler.max_running == 8
    assert config.kv_transfer.transport == "tcp"
    assert config.router.admission == "slo"
    assert config.slo.ttft_ms == 500.0


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("pools.prefil.workers=2", "did you mean pools.prefill?"),
        ("engine.model=x", "unknown key engine.model"),
        ("host.cluster_token=x", "unknown key host.cluster_token"),
        ("model=smollm2", "model must be a table"),
        ("model.dtype=fp8", "model.dtype = 'fp8' is unknown"),
        ("pools.decode.workers=0", "no worker can decode"),
        ("pools.decode.workers=-1", "workers = -1 is negative"),
        ("pools.decode.cpus=-1", "cpus = -1.0 is out of range"),
        ("pools.decode.cores=[1, 1]", "different core numbers"),
        ("pools.prefill.tensor_parallel=0", "tensor_parallel = 0 is out of range; use 1 to 256"),
        ("engine.tensor_parallel=2", "unknown key engine.tensor_parallel"),
        ("router.admission=maybe", "router.admission"),
        ("name=a/b", "must be up to 64"),
        ("kv_transfer.transport=infiniband", "'infiniband' is unknown; use one of auto, cuda_ipc, shm,"),
        ("gateway.host=0.0.0.0", "set security.cluster_token"),
        ("ray.address=ray://x:1", "not a ray:// client address"),
        ("supervisor.hang_grace_s=0", "supervisor.hang_grace_s"),
        ("security.cluster_token=é", "security.cluster_token must be up to 1024 ASCII letters"),
        ("security.cluster_token=a\nb", "security.cluster_token must be"),
        ('security.cluster_token=" ab"', "neither begin nor end with a space"),
        (f"security.cluster_token=s{'x' * 1024}", "up to 1024"),
        ("pools.decode.workers=1025", "workers = 1025 is out of range; use up to 1024"),
        ("pools.decode.cpus=10001", "cpus = 10001.0 is out of range; use 0 to 10000"),
        ("pools.decode.resources={fast = -1}", "resources: fast = -1.0 is out of range"),
        ("gateway.drain_s=1e10", "gateway.drain_s = 10000000000.0 is out of range; use 0 to 1e+09"),
    ],
)
def test_wrong_settings_are_refused_with_the_setting_and_the_reason(setting: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(setting)
    assert caught.value.message.startswith(f"--set {setting}: ")
    assert complaint in caught.value.message


def test_a_worker_may_listen_on_every_interface_because_the_token_is_drawn() -> None:
    assert loaded("host.host=0.0.0.0").host.host == "0.0.0.0"


def test_the_example_for_several_nodes_is_a_valid_configuration() -> None:
    config = loaded(file=Path(__file__).parents[2] / "deploy" / "several_nodes.toml")
    assert config.gateway.replicas == 2
    assert config.pools.prefill.placement.strategy == "SPREAD"


def test_cores_are_dealt_out_evenly_and_in_order() -> None:
    placement = PlacementConfig(workers=2, cores=[4, 5, 6, 7])
    assert [placement.cores_of(0), placement.cores_of(1)] == [[4, 5], [6, 7]]
    with pytest.raises(ConfigError, match="cannot share evenly"):
        PlacementConfig(workers=2, cores=[0, 1, 2])
    with pytest.raises(ConfigError, match="2 workers of 2 processes cannot share evenly"):
        PlacementConfig(workers=2, tensor_parallel=2, cores=[0, 1])


def test_every_pool_has_its_own_tensor_parallelism_and_each_process_its_cores() -> None:
    config = loaded("pools.prefill.tensor_parallel=2", "pools.prefill.cores=[4, 5, 6, 7]")

    def engine(role: str) -> tuple[EngineConfig, list[int]]:
        placement = config.pools.placements()[role]
        assignment = Assignment(
            worker_id="w", role=role, config=config, store_url="", cores=placement.cores_of(0)
        )
        return _worker_config(assignment, "127.0.0.1").engine, assignment.own_cores

    prefill, own = engine("prefill")
    assert (prefill.tensor_parallel, prefill.cores, own) == (2, (4, 5, 6, 7), [4, 5])
    assert [prefill.cores_of(rank) for rank in range(2)] == [(4, 5), (6, 7)]
    decode, own = engine("decode")
    assert (decode.tensor_parallel, decode.cores, own) == (1, (), [])


def test_a_pool_may_have_its_own_memory_for_kv(tmp_path: Path) -> None:
    config = loaded("engine.kv_cache_mib=64", "pools.decode.kv_cache_mib=96")

    def kv_cache_mib(config: ClusterConfig, role: str) -> int:
        assignment = Assignment(worker_id="w", role=role, config=config, store_url="")
        return _worker_config(assignment, "127.0.0.1").engine.kv_cache_mib

    assert [kv_cache_mib(config, role) for role in ("prefill", "decode", "colocated")] == [64, 96, 64]
    restarted = changed(config, ["pools.prefill.kv_cache_mib=32"])
    assert [kv_cache_mib(restarted, role) for role in ("prefill", "decode")] == [32, 96]
    with pytest.raises(ConfigError, match=r"\[pools.decode\] kv_cache_mib = -1 is out of range"):
        loaded("pools.decode.kv_cache_mib=-1")


def test_a_worker_reserves_what_it_takes() -> None:
    placement = PlacementConfig(cpus=2, gpus=1, resources={"fabric": 1.0, "none": 0.0})
    assert placement.bundle() == {"CPU": 2, "GPU": 1, "fabric": 1.0}
    assert PlacementConfig(cpus=0).bundle() == {"CPU": 0.001}


def test_the_printed_configuration_reads_back_as_the_same_one(tmp_path: Path) -> None:
    config = loaded("security.cluster_token=s", "pools.decode.resources={fast = 1}", "pools.decode.cores=[1]")
    file = tmp_path / "printed.toml"
    file.write_text(to_toml(config, hidden=GIVEN))
    assert loaded("security.cluster_token=s", file=file) == config


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:pass@host:1/0", "redis://me:<redacted>@host:1/0"),
        ("redis://:pa@pass@host:1/0", "redis://:<redacted>@host:1/0"),
        ("unix:///run/s?db=1&password=pass", "unix:///run/s?db=1&password=<redacted>"),
        ("redis://me@host:1/0", "redis://me@host:1/0"),
    ],
)
def test_the_printed_configuration_hides_secrets(url: str, shown: str) -> None:
    text = to_toml(loaded("security.cluster_token=hush", f"store.url={url}"), hidden=GIVEN)
    assert "hush" not in text
    assert "# cluster_token is set and not shown" in text
    assert "cluster_token" not in tomllib.loads(text)["security"]
    assert tomllib.loads(text)["store"]["url"] == shown


def test_what_was_drawn_is_printed_as_left_open_and_drawn_anew_when_read(tmp_path: Path) -> None:
    file = tmp_path / "printed.toml"
    file.write_text(to_toml(loaded(seed=1), hidden=GIVEN))
    printed = tomllib.loads(file.read_text())
    assert (printed["name"], printed["security"]["cluster_token"]) == ("", "")
    assert loaded(file=file, seed=2) == loaded(seed=2)


@pytest.mark.parametrize("secret", ["", "hush"])
def test_a_printed_configuration_opens_no_gateway_to_other_machines(secret: str, tmp_path: Path) -> None:
    file = tmp_path / "printed.toml"
    file.write_text(to_toml(loaded(f'security.cluster_token="{secret}"'), hidden=GIVEN))
    with pytest.raises(ConfigError, match=r"set security\.cluster_token"):
        loaded("gateway.host=0.0.0.0", file=file)


@pytest.mark.parametrize(
    "setting", ["security.cluster_token=<redacted>", "store.url=redis://:<redacted>@host:1/0"]
)
def test_a_redacted_value_is_no_value(setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(setting)
    path = setting.partition("=")[0]
    assert caught.value.message.startswith(f"--set {setting}: {path} holds <redacted>")


def test_every_key_is_printed_under_its_docstring() -> None:
    lines = to_toml(loaded(), hidden=GIVEN).splitlines()
    keys = [i for i, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(keys) > 50
    undocumented = [lines[i] for i in keys if not lines[i - 1].startswith("# ")]
    assert undocumented == []


def test_docstrings_of_fields_are_found_in_subclasses_too() -> None:
    assert field_docs(PlacementConfig)["workers"] == "Worker processes of the pool."
