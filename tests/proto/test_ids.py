"""Names of requests and processes."""

from __future__ import annotations

import random

import pytest
from diphase.proto.errors import InvalidRequest
from diphase.proto.ids import HandoffKey, check_request_id, draw_id


@pytest.mark.parametrize("request_id", ["a", "A-1_b.c:d", "x" * 128, "0" * 24])
def test_good_names_come_back_unchanged(request_id: str) -> None:
    assert check_request_id(request_id) == request_id


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a b", "a/b", "é", "a\n", "a\0", "x" * 100_000])
def test_bad_names_are_refused_with_the_rule_and_without_their_whole_length(request_id: str) -> None:
    with pytest.raises(InvalidRequest, match="1 to 128 characters") as caught:
        check_request_id(request_id)
    assert len(caught.value.message) < 500


def test_drawn_names_are_valid_distinct_and_a_function_of_the_seed() -> None:
    rng, again = random.Random(5), random.Random(5)
    drawn = [draw_id(rng, "r-") for _ in range(1000)]
    assert len(set(drawn)) == 1000
    assert all(check_request_id(name).startswith("r-") and len(name) == 26 for name in drawn)
    assert drawn == [draw_id(again, "r-") for _ in range(1000)]


def test_a_new_attempt_is_another_handoff() -> None:
    assert HandoffKey("r", 0) != HandoffKey("r", 1)
    assert {HandoffKey("r", 1): "x"}[HandoffKey("r", 1)] == "x"
