"""StopMatcher: text up to the first stop string, however it is cut."""

from __future__ import annotations

import pytest
from diphase.router.stop_strings import StopMatcher
from hypothesis import given
from hypothesis import strategies as st

LETTERS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    passed = ""
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        passed += text
        if stopped:
            return passed, True
    return passed + matcher.flush(), False


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Reads letter by letter; ends where the first stop string is complete, at its longest form."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], True
    return text, False


@given(LETTERS, STOPS, st.data())
def test_the_outcome_does_not_depend_on_the_cuts(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(pieces, stops) == reference(text, stops)


@given(LETTERS, STOPS)
def test_nothing_of_a_stop_string_is_passed_early(text: str, stops: list[str]) -> None:
    expected, _ = reference(text, stops)
    matcher = StopMatcher(stops)
    passed = ""
    for letter in text:
        piece, stopped = matcher.feed(letter)
        passed += piece
        assert expected.startswith(passed)
        if stopped:
            break


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["Hello wor", "ld"], ["world"], ("Hello ", True)),
        (["Hello wor", "k"], ["world"], ("Hello work", False)),
        (["a", "b", "c"], ["bc", "abc"], ("", True)),
        (["über", "\n\n", "x"], ["\n\n"], ("über", True)),
    ],
)
def test_examples(pieces: list[str], stops: list[str], expected: tuple[str, bool]) -> None:
    assert run(pieces, stops) == expected
