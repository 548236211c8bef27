"""The hand-off's machines with one guard taken out each, made from their source.

A guard is the condition of an `if` or of a conditional expression (forced to False and to True), each operand
of an `and` or `or` in one, the arming or disarming of a deadline (a keyword that ends in `_at`), and each
cell of a table in which nothing happens (it gets the handler that the nearest state has for the event).
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from types import ModuleType
from typing import Any, NamedTuple

from diphase.kv_transfer import admission, decode_side, prefill_side
from diphase.kv_transfer import machine as k

from .handoff_parts import Protocol

SKIPPED = {"_row", "step_prefill", "step_decode", "check_reservation", "ready", "was_ready", "_note"}
"""They guard no hand-off: the form of the table, the size of a reservation, notes."""


class Mutant(NamedTuple):
    name: str
    """Stable: module, function, what was there, and what is there instead."""
    line: int
    module: ModuleType
    change: Callable[[ast.Module], None]
    stray: tuple[str, str, type] | None
    """The cell (side, state, event) that it fills."""

    @property
    def place(self) -> str:
        """The function or table that it is in."""
        return self.name.partition(":")[0]

    def protocol(self) -> Protocol:
        """Both machines, one of them this one."""
        tree = parsed(self.module)
        self.change(tree)
        ast.fix_missing_locations(tree)
        module = ModuleType(self.module.__name__)
        module.__dict__.update(__package__=self.module.__package__, __file__=self.module.__file__)
        # dataclasses look their module up by its name.
        original = sys.modules[module.__name__]
        sys.modules[module.__name__] = module
        try:
            exec(compile(tree, str(module.__file__), "exec"), module.__dict__)
        finally:
            sys.modules[module.__name__] = original
        names = {
            prefill_side: ("start_prefill", "step_prefill"),
            decode_side: ("start_decode", "step_decode"),
            admission: ("NewestAttempts",),
        }[self.module]
        fields = {"NewestAttempts": "newest_attempts"}
        return Protocol(**{fields.get(name, name): getattr(module, name) for name in names})


def mutants() -> Iterator[Mutant]:
    for module in (prefill_side, decode_side, admission):
        yield from of_code(module)
    yield from of_table(prefill_side, "p", "PREFILL_TABLE")
    yield from of_table(decode_side, "d", "DECODE_TABLE")


def parsed(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def of_code(module: ModuleType) -> Iterator[Mutant]:
    tree = parsed(module)
    seen: dict[str, int] = {}
    for number, node in enumerate(ast.walk(tree)):
        if not isinstance(node, ast.FunctionDef) or node.name in SKIPPED:
            continue
        for place, inner in enumerate(ast.walk(node)):
            for what, change in changes(inner):
                name = f"{module.__name__.rpartition('.')[2]}.{node.name.strip('_')}: {what}"
                seen[name] = seen.get(name, 0) + 1
                if seen[name] > 1:
                    name += f" ({seen[name]})"
                line = getattr(inner, "lineno", 0)
                yield Mutant(name, line, module, partial(change_at, number, place, change), None)


def change_at(number: int, place: int, change: Callable[[ast.AST], None], tree: ast.Module) -> None:
    """Changes the node `place` of the function that is node `number` of the module."""
    change(nth(nth(tree, number), place))


def nth(tree: ast.AST, number: int) -> ast.AST:
    return next(islice(ast.walk(tree), number, None))


def changes(node: Any) -> Iterator[tuple[str, Any]]:
    """What may be taken out of one node: its description, and a function that does it."""
    if isinstance(node, ast.If | ast.IfExp):
        test = ast.unparse(node.test)
        for value in (False, True):
            yield f"`{test}` is {value}", lambda n, v=value: setattr(n, "test", ast.Constant(v))
        if isinstance(node.test, ast.BoolOp):
            for at, operand in enumerate(node.test.values):
                yield f"`{test}` without `{ast.unparse(operand)}`", partial(drop_operand, at)
    if isinstance(node, ast.Call):
        for at, keyword in enumerate(node.keywords):
            if keyword.arg and keyword.arg.endswith("_at"):
                yield f"no `{ast.unparse(keyword)}`", lambda n, a=at: n.keywords.pop(a)


def drop_operand(at: int, node: Any) -> None:
    del node.test.values[at]
    if len(node.test.values) == 1:
        node.test = node.test.values[0]


def of_table(module: ModuleType, side: str, name: str) -> Iterator[Mutant]:
    table = getattr(module, name)
    states = list(table)
    line = next(n.lineno for n in parsed(module).body if name in ast.unparse(n).partition(" = ")[0])
    for at, state in enumerate(states):
        for kind, cell in table[state].items():
            if not isinstance(cell, k.Refusal):
                continue
            near = sorted(range(len(states)), key=lambda other: (abs(other - at), -other))
            handlers = (table[states[other]][kind] for other in near)
            handler = next((h for h in handlers if not isinstance(h, k.Refusal)), None)
            assert handler is not None, f"no state does anything at {kind}"
            filled = f"{name}[S.{state.name}][k.{kind.__name__}] = {handler.__name__}"
            what = f"{state} at {kind.__name__}: {handler.__name__.strip('_')}"
            change = partial(append, filled)
            yield Mutant(f"{name}: {what}", line, module, change, (side, str(state), kind))


def append(statement: str, tree: ast.Module) -> None:
    tree.body += ast.parse(statement).body
