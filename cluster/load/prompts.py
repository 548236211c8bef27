"""Prompts without meaning but with the right lengths and the right shared prefixes.

A prompt is token ids drawn by seed, or words made of such ids. Blocks that a trace names by hash id are drawn
from the id, so that requests with equal ids share exactly the prefix that they shared in the trace.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_REQUEST, _BLOCK = 3, 4

# Frequent words: byte-pair vocabularies hold each of them, with its leading space, as one token.
_TEXT = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which
one you were all her she there would their we him been has when who will no more if out so up said what its
about than into them can only other time new some could these two may first then do any like my now over such
our man me even most made after also did many off before must well back through years much where your way down
should because long each just state those people too how little good world make very year still see own work
men day get here old life both between being under three never know same last another while
"""
_WORDS = _TEXT.split()


class PromptSource:
    """Draws the prompts of one run."""

    def __init__(self, *, vocab_size: int, seed: int, salt: int, block_tokens: int, text: bool) -> None:
        """`block_tokens`: prompt tokens that one hash id stands for, at the scale of the run."""
        self._root = (seed, salt)
        self._block_tokens = block_tokens
        self._text = text
        # Vocabularies begin with special tokens and single bytes; ordinary tokens follow.
        self._low = min(1000, vocab_size // 8)
        self._high = vocab_size
        self._blocks: dict[int, list[int]] = {}

    def draw(self, index: int, num_tokens: int, hash_ids: Sequence[int] = ()) -> str | list[int]:
        """The prompt of request `index`: `num_tokens` ids, or as many words."""
        ids: list[int] = []
        for hash_id in hash_ids:
            if len(ids) >= num_tokens:
                break
            ids.extend(self._block(hash_id))
        del ids[num_tokens:]
        if len(ids) < num_tokens:
            ids.extend(self._ids((*self._root, _REQUEST, index), num_tokens - len(ids)))
        return " ".join(_WORDS[i % len(_WORDS)] for i in ids) if self._text else ids

    def _block(self, hash_id: int) -> list[int]:
        if hash_id not in self._blocks:
            self._blocks[hash_id] = self._ids((*self._root, _BLOCK, hash_id), self._block_tokens)
        return self._blocks[hash_id]

    def _ids(self, key: tuple[int, ...], count: int) -> list[int]:
        drawn: list[int] = np.random.default_rng(key).integers(self._low, self._high, size=count).tolist()
        return drawn
