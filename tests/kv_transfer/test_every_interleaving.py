"""Every interleaving of small worlds: the invariants hold in each state, and break when one guard is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from .exploration import explore
from .guards import EQUIVALENT, kept, try_out
from .mutants import Mutant, mutants
from .small_worlds import FLOORS, WORLDS

MUTANTS = {mutant.name: mutant for mutant in mutants()}


@pytest.mark.parametrize("name", FLOORS)
def test_every_interleaving_keeps_the_invariants(name: str) -> None:
    found = explore(WORLDS[name])
    assert not found.violation, "\n".join([found.violation, *map(str, found.history)])
    print(f"{name}: {found.states} states, {found.transitions} transitions, {found.at_rest} at rest")
    assert found.states >= FLOORS[name], "the exploration has collapsed"


def test_the_table_of_guards_names_every_mutant_once() -> None:
    assert sorted([*kept(), *EQUIVALENT]) == sorted(MUTANTS)
    page = (Path(__file__).parents[2] / "docs" / "handoff.md").read_text(encoding="utf-8")
    assert f"{len(kept())} variants" in page
    assert f"{len(EQUIVALENT)} more are equivalent" in page
    assert set(kept().values()) <= set(FLOORS), "a world that no test explores to its end proves nothing"


@pytest.mark.parametrize("function", sorted({mutant.place for mutant in MUTANTS.values()}))
def test_without_any_one_guard_an_invariant_breaks(function: str) -> None:
    """One test for each function and each table; what it prints names the guards by line."""
    here = [mutant for mutant in MUTANTS.values() if mutant.place == function]
    unnoticed = [mutant for mutant in here if not is_noticed(mutant)]
    assert not unnoticed, [f"line {mutant.line}: {mutant.name}" for mutant in unnoticed]


def is_noticed(mutant: Mutant) -> bool:
    if mutant.name in EQUIVALENT:
        return True
    found = try_out(mutant, kept()[mutant.name])
    print(f"line {mutant.line}: {mutant.name}: {found.violation} after {len(found.history)} moves")
    return bool(found.violation)


@pytest.mark.parametrize("name", EQUIVALENT)
def test_what_is_called_equivalent_breaks_nothing(name: str) -> None:
    for world in ("message", "write, fence", "prompt", "owner"):
        assert not try_out(MUTANTS[name], world).violation, (
            f"{world} shows what it is for: add it to the table"
        )
