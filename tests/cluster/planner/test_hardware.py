"""Hardware files: those of the package, one's own, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from diphase.cluster.planner.hardware import FOLDER, known_hardware, load_hardware
from diphase.proto.errors import ConfigError

TEXT = (FOLDER / "h100-sxm.toml").read_text()


def test_the_package_has_four() -> None:
    assert known_hardware() == ["a100-sxm-80gb", "b200-sxm", "h100-sxm", "h200-sxm"]
    a100, b200, h100, h200 = map(load_hardware, known_hardware())
    assert (b200.bf16_tflops, b200.fp8_tflops, b200.hbm_gb_per_s) == (2250.0, 4500.0, 8000.0)
    assert (a100.bf16_tflops, a100.hbm_gb_per_s, a100.fp8_tflops) == (312.0, 2039.0, None)
    assert h100.bf16_tflops == h200.bf16_tflops == 989.0
    assert h200.memory_gib > h100.memory_gib == a100.memory_gib == 80.0


def test_one_of_ones_own_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace('"H100-SXM"', '"Mine"').replace("989.0", "500"))
    assert load_hardware(str(path)).bf16_tflops == 500.0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("hbm_gb_per_s", "hbm_gbps", r"unknown key hbm_gbps; did you mean hbm_gb_per_s\?"),
        ("bf16_tflops = 989.0", "", "bf16_tflops is missing"),
        ("memory_gib = 80.0", "memory_gib = 0", "memory_gib is 0.0; it must be above 0"),
        ("memory_gib = 80.0", "memory_gib = 1e5", "memory_gib is 100000; a GPU has at most 4096 GiB here"),
        ("gpus_per_node = 8", "gpus_per_node = -8", "gpus_per_node is -8; it must be above 0"),
        ("gpus_per_node = 8", "gpus_per_node = 7.5", "gpus_per_node"),
        ("fp8_tflops = 1979.0", "fp8_tflops = -1.0", "fp8_tflops is -1.0; it must be above 0"),
        ("power_w = 700.0", "power_w = nan", "power_w"),
        ("power_w = 700.0", "power_w = 1e13", r"power_w is 1e\+13 and out of range; use 0.001 to 1e\+09"),
        ("intra_node_gb_per_s = 450.0", "intra_node_gb_per_s = 1e-9", "intra_node_gb_per_s is 1e-09 and out"),
        ("hbm_gb_per_s = 3350.0", "hbm_gb_per_s = 1e-300", "hbm_gb_per_s is 1e-300 and out of range"),
        ("power_w = 700.0", "power_w = 700.0\nlink_share = 1.5", "link_share is 1.5; it is a share"),
        ("power_w = 700.0", "power_w = 700.0\nhandoff_s = 1e9", "handoff_s is 1000000000.0; use more than 0"),
        (
            "price_per_hour = 4.75",
            "price_per_hour = 1e8",
            r"price_per_hour is 1e\+08; use 0.001 to 1,000,000",
        ),
        ("power_w = 700.0", 'power_w = "700"', "power_w"),
        ('name = "H100-SXM"', 'name = ""', "name is empty"),
        ("power_w = 700.0", "power_w = ", "not valid TOML"),
    ],
)
def test_bad_values_are_refused_with_file_and_key(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in TEXT
    path = tmp_path / "bad.toml"
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(ConfigError, match=rf"bad\.toml.*{said}"):
        load_hardware(str(path))


def test_unknown_hardware_is_answered_with_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'b300'.*a100-sxm-80gb, b200-sxm, h100-sxm, h200-sxm"):
        load_hardware("b300")
