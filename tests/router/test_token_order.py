"""TokenOrder: every index once, in order, whatever comes how."""

from __future__ import annotations

from diphase.proto import inference_pb2 as pb
from diphase.router.token_order import TokenOrder
from hypothesis import given
from hypothesis import strategies as st


@given(st.data())
def test_pieces_in_any_order_and_repeated_give_the_sequence(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 20))
    tokens = list(range(100, 100 + count))
    pieces = []
    start = 0
    while start < count:
        length = data.draw(st.integers(1, count - start))
        pieces.append((start, length))
        start += length
    repeats = data.draw(st.lists(st.sampled_from(pieces), max_size=5))
    order = TokenOrder()
    for first, length in data.draw(st.permutations(pieces + repeats)):
        part = tokens[first : first + length]
        order.add(first, part, [pb.TokenLogprobs(logprob=-token) for token in part])
        assert order.token_ids == tokens[: len(order.token_ids)]
    assert order.token_ids == tokens
    assert [-x.logprob for x in order.logprobs] == tokens
    assert not order.has_gap


def test_overlapping_tokens_are_taken_once() -> None:
    order = TokenOrder()
    assert order.add(0, [1, 2, 3], [])
    assert order.add(1, [2, 3, 4, 5], [])
    assert not order.add(0, [1, 2], [])
    assert order.token_ids == [1, 2, 3, 4, 5]


def test_a_gap_holds_back_what_is_behind_it() -> None:
    order = TokenOrder()
    assert not order.add(1, [2], [])
    assert order.has_gap
    assert order.token_ids == []
    assert order.add(0, [1], [])
    assert order.token_ids == [1, 2]


def test_what_came_early_is_forgotten_with_its_attempt() -> None:
    order = TokenOrder()
    order.add(0, [1], [])
    order.add(3, [9], [])
    order.drop_early()
    assert order.add(1, [2, 3], [])
    assert order.token_ids == [1, 2, 3]
