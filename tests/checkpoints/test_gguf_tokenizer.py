"""Vocabularies that a damaged or hostile GGUF file may have; test_tokenizer.py has the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.tokenizer import load_tokenizer
from diphase.proto.errors import CheckpointError


def sentence_piece(make: Any, tokens: list[str], scores: Any) -> Any:
    tokens = [*tokens, *(f"u{i}" for i in range(320 - len(tokens)))]
    return make.gguf(
        tokenizer__ggml__model="llama", tokenizer__ggml__tokens=tokens, tokenizer__ggml__scores=scores
    )


@pytest.mark.parametrize("token", [":", "$", "a"])
def test_any_token_may_begin_the_text(make: Any, token: str) -> None:
    bos = make.metadata()["tokenizer.ggml.tokens"].index(token)
    path = make.gguf(tokenizer__ggml__bos_token_id=bos, tokenizer__ggml__add_bos_token=True)
    tokenizer = load_tokenizer(resolve(str(path)))
    assert tokenizer.encode("b", True) == [bos, *tokenizer.encode("b", False)]


def test_every_token_may_be_a_control_token(make: Any) -> None:
    """With one call to the library for each token, these took hours."""
    size = 50_000
    tokens = [*make.metadata()["tokenizer.ggml.tokens"], *(f"more{i}" for i in range(size - 320))]
    embedding = np.zeros((size, 64), np.float32)
    path = make.gguf(
        "BF16",
        weights=make.weights | {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding},
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__token_type=np.full(size, 3, np.int32),
    )
    assert load_tokenizer(resolve(str(path))).special_token_ids == frozenset(range(size))


@pytest.mark.parametrize("scores", [["x"] * 320, np.zeros(320, bool), np.zeros(319, np.float32)])
def test_scores_that_are_no_numbers_are_an_error(make: Any, scores: Any) -> None:
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.ggml\.scores"):
        load_tokenizer(resolve(str(sentence_piece(make, ["a"], scores))))


def test_a_token_of_a_sentence_piece_vocabulary_has_a_limit(make: Any) -> None:
    path = sentence_piece(make, ["a" * 4097], np.zeros(320, np.float32))
    with pytest.raises(CheckpointError, match="a token of 4097 characters; at most 4096"):
        load_tokenizer(resolve(str(path)))
