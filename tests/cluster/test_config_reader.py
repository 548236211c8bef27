from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from diphase.cluster.config_reader import FLATTEN, Source, apply_overrides, build, parse_value, read_file
from diphase.proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheels:
    count: int = 4
    spare: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count = {self.count} is too small")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    power: float = 1.5
    fuel: Literal["diesel", "petrol"] = "petrol"
    label: str | None = None
    gears: list[int] = field(default_factory=lambda: [1, 2])
    parts: dict[str, float] = field(default_factory=dict)
    limit: int | Literal["auto"] = "auto"
    serial: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Car:
    owner: str
    tags: tuple[str, ...] = ()
    engine: Engine = field(default_factory=Engine)
    wheels: Wheels = field(default_factory=Wheels, metadata=FLATTEN)


def car(table: dict[str, object], *settings: str, given: dict[str, object] | None = None) -> Car:
    source = Source("car.toml", given=given or {})
    whole = {"owner": "me", **table}
    apply_overrides(whole, settings, source)
    return build(Car, whole, source)


def test_absent_keys_take_their_defaults() -> None:
    assert car({}) == Car(owner="me")


def test_a_flattened_section_stands_in_its_owners_table() -> None:
    assert car({"count": 3}).wheels == Wheels(count=3)


def test_every_kind_of_value_is_taken() -> None:
    table = {"power": 2, "fuel": "diesel", "label": "x", "gears": [1], "parts": {"bolt": 1}, "limit": 5}
    engine = car({"engine": table}).engine
    assert engine == Engine(power=2.0, fuel="diesel", label="x", gears=[1], parts={"bolt": 1.0}, limit=5)
    assert isinstance(engine.power, float)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"engine": {"powr": 1.0}}, "car.toml: unknown key engine.powr; did you mean engine.power?"),
        ({"engin": {}}, "car.toml: unknown key engin; did you mean engine?"),
        ({"zzz": 1}, "car.toml: unknown key zzz; known are owner, tags, engine, count, spare"),
        ({"count": True}, "count must be an integer, not true"),
        ({"count": 1.0}, "count must be an integer, not 1.0"),
        ({"count": "4"}, "count must be an integer, not '4'"),
        ({"spare": 1}, "spare must be true or false, not 1"),
        ({"owner": 1}, "owner must be a string, not 1"),
        ({"engine": {"power": False}}, "engine.power must be a number, not false"),
        ({"engine": {"fuel": "coal"}}, "engine.fuel must be one of 'diesel', 'petrol', not 'coal'"),
        ({"engine": {"label": 3}}, "engine.label must be a string, not 3"),
        ({"engine": {"gears": 3}}, "engine.gears must be an array like [3], not 3"),
        ({"engine": {"gears": {}}}, "engine.gears must be an array, not {}"),
        ({"engine": {"gears": "3" * 999}}, "engine.gears must be an array, not '333"),
        ({"engine": {"gears": ["a"]}}, "engine.gears[0] must be an integer, not 'a'"),
        ({"engine": {"parts": {"bolt": "x"}}}, "engine.parts.bolt must be a number, not 'x'"),
        ({"engine": {"limit": 1.5}}, "engine.limit must be an integer or 'auto', not 1.5"),
        ({"engine": 4}, "engine must be a table, not 4"),
        ({"count": 2**31}, "count must be an integer from -2147483647 to 2147483647, not 2147483648"),
        ({"engine": {"gears": [1, -(2**31)]}}, "engine.gears[1] must be an integer from -2147483647 to"),
        ({"engine": {"power": float("nan")}}, "engine.power must be a number from -100000000000000 to"),
        ({"engine": {"power": float("-inf")}}, "engine.power must be a number from -100000000000000 to"),
        ({"engine": {"power": 10**400}}, "engine.power must be a number from -100000000000000 to"),
        (
            {"engine": {"parts": {"bolt": 1e308}}},
            "engine.parts.bolt must be a number from -100000000000000 to",
        ),
        ({"count": 16**5000}, "2147483647, not what is given, which is too large to be shown"),
        ({"count": 0}, "car.toml: count = 0 is too small"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_path(table: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        car(table)
    assert complaint in caught.value.message


def test_a_key_without_default_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"car\.toml: owner is missing"):
        build(Car, {}, Source("car.toml"))


def test_an_override_wins_over_the_file_and_is_blamed_for_its_own_mistakes() -> None:
    assert car({"count": 3}, "count=6").wheels.count == 6
    with pytest.raises(ConfigError, match=r"--set engine\.power=much: engine\.power must be a number"):
        car({}, "engine.power=much")
    with pytest.raises(ConfigError, match=r"--set engine\.gears=\[1, 2\.5\]: engine\.gears\[1\] must be"):
        car({}, "engine.gears=[1, 2.5]")


@pytest.mark.parametrize("text", ["a", "[a]"])
def test_an_array_that_is_none_is_shown_as_one_that_a_shell_leaves_alone(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        car({}, f"tags={text}")
    assert caught.value.message.endswith(
        f"""tags must be an array like ["a"] (in a shell: --set tags='["a"]'), not '{text}'"""
    )
    with pytest.raises(ConfigError, match=r'car.toml: tags must be an array like \["a", "b"\], not'):
        car({"tags": "a, b"})


def test_an_override_makes_the_sections_it_names() -> None:
    assert car({}, "engine.fuel=diesel").engine.fuel == "diesel"


@pytest.mark.parametrize("setting", ["count", "=3", "engine..power=1", "owner.name=1"])
def test_a_malformed_override_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        car({}, setting)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"a b"', "a b"),
        ("127.0.0.1", "127.0.0.1"),
        ("dummy:tiny", "dummy:tiny"),
        ("2024-01-01", "2024-01-01"),
        ("", ""),
        ("1\nother = 2", "1\nother = 2"),
    ],
)
def test_an_override_is_toml_or_else_a_bare_string(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_none_takes_an_optional_value_back() -> None:
    assert car({"engine": {"label": "x"}}, "engine.label=none").engine.label is None


def test_a_given_value_is_set_and_its_key_is_unknown_to_the_file() -> None:
    given: dict[str, object] = {"engine.serial": "0001"}
    assert car({}, given=given).engine.serial == "0001"
    assert car({"engine": {"power": 3.0}}, given=given).engine == Engine(power=3.0, serial="0001")
    with pytest.raises(ConfigError, match=r"unknown key engine\.serial"):
        car({"engine": {"serial": "2"}}, given=given)


def test_a_file_that_is_no_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("a = 1\nb =\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: is not valid TOML.*line 2"):
        read_file(path)


BEYOND = (("[" * 5000, "nested too deeply"), ("9" * 5000, "an integer of thousands of digits"))


@pytest.mark.parametrize(("value", "complaint"), BEYOND, ids=("deep", "long"))
def test_a_value_beyond_what_is_read_is_refused_with_its_file(
    value: str, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f"a = {value}")
    with pytest.raises(ConfigError, match=rf"bad\.toml: is not valid TOML: .*{complaint}"):
        read_file(path)


@pytest.mark.parametrize(("value", "complaint"), BEYOND, ids=("deep", "long"))
def test_a_value_beyond_what_is_read_is_refused_with_its_setting(value: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"--set engine\.power=\.\.\.: .*{complaint}"):
        car({}, f"engine.power={value}")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_file(tmp_path / "none.toml")
