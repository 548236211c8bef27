"""Puts the tokens of one attempt in order. Prefill's and decode's outputs come on different streams, so token
1 may be here before token 0; a worker that answers a re-attach repeats what it sent before."""

from __future__ import annotations

from collections.abc import Sequence

from ..proto import inference_pb2 as pb

Logprobs = Sequence[pb.TokenLogprobs]


class TokenOrder:
    """Appends to `token_ids` (and `logprobs`, where the request wants them) every index once, without
    gaps."""

    __slots__ = ("_early", "logprobs", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[pb.TokenLogprobs] = []
        self._early: dict[int, tuple[Sequence[int], Logprobs]] = {}  # by index of the first token

    @property
    def has_gap(self) -> bool:
        """Whether later tokens are here while an earlier one is missing."""
        return bool(self._early)

    def add(self, index: int, token_ids: Sequence[int], logprobs: Logprobs) -> bool:
        """Takes tokens `index` on; True when the sequence grew."""
        known = len(self.token_ids)
        if index > known:
            if len(token_ids) > len(self._early.get(index, ((),))[0]):
                self._early[index] = (token_ids, logprobs)
            return False
        if not self._append(index, token_ids, logprobs):
            return False
        while self._early:
            first = min(self._early)
            if first > len(self.token_ids):
                break
            self._append(first, *self._early.pop(first))
        return True

    def drop_early(self) -> None:
        """The attempt is over: what came ahead of a gap will come again."""
        self._early.clear()

    def _append(self, index: int, token_ids: Sequence[int], logprobs: Logprobs) -> bool:
        repeated = len(self.token_ids) - index
        if repeated >= len(token_ids):
            return False
        self.token_ids.extend(token_ids[repeated:] if repeated else token_ids)
        if logprobs:
            self.logprobs.extend(logprobs[repeated:])
        return True
