"""Token ids to text while they arrive: on the path of every token that a client sees.

A completion follows its prompt, so its first space is kept where a text of its own would lose it. Text is
given out as soon as its characters are complete; bytes of an unfinished one wait for the next token.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from .tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """One stream of tokens. The concatenation of everything that push and flush return is the text of all
    ids, however they were split."""

    __slots__ = ("_decoder", "_join", "_pending", "_pieces", "_strip")

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool = False) -> None:
        """`at_start`: the tokens begin a text instead of following one; the concatenation is then
        tokenizer.decode of all ids, which for byte-level tokenizers it is anyway."""
        self._join = tokenizer.join
        self._pieces = tokenizer.pieces
        self._decoder = _UTF8("replace")
        self._pending = False
        self._strip = at_start and tokenizer.strips_first_space

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty, never half a character.

        Raises:
            InvalidRequest: an id is outside the model's vocabulary.
        """
        # One token a step is the rule, and worth not building a list for.
        if len(token_ids) == 1 and token_ids[0] < len(self._pieces):
            data = self._pieces[token_ids[0]]
        else:
            data = self._join(token_ids)
        if not self._pending and data.isascii():
            text = data.decode("ascii")
        else:
            text = self._decoder.decode(data)
            self._pending = bool(self._decoder.getstate()[0])
        return self._stripped(text) if self._strip and text else text

    def flush(self) -> str:
        """The rest: an unfinished character becomes U+FFFD. The stream is over; the object may start
        another."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        self._pending = False
        return text

    def _stripped(self, text: str) -> str:
        self._strip = False
        return text.removeprefix(" ")
