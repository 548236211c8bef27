"""SentencePiece vocabularies of GGUF files, against what their definition says."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.tokenizer import load_tokenizer

SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
SPM_WORDS = [
    "▁",
    "a",
    "b",
    "c",
    "d",
    "ab",
    "bc",
    "abc",
    "▁a",
    "▁ab",
    "▁abc",
    "cd",
    "é",
    "▁c",
    "▁▁",
    "<",
    "s",
    ">",
]


def sentence_piece_gguf(make: Any, **changes: Any) -> Any:
    """Scores fall with the position, as SentencePiece numbers its BPE pieces."""
    tokens = SPM_TOKENS + SPM_WORDS
    types = [2, 3, 3] + [6] * 256 + [1] * len(SPM_WORDS)
    scores = np.array([0.0] * len(SPM_TOKENS) + [-float(i) for i in range(len(SPM_WORDS))], np.float32)
    return make.gguf(
        tokenizer__ggml__model="llama",
        tokenizer__ggml__pre="default",
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__scores=scores,
        tokenizer__ggml__token_type=np.array(types, np.int32),
        tokenizer__ggml__merges=None,
        tokenizer__ggml__unknown_token_id=0,
        tokenizer__ggml__bos_token_id=1,
        tokenizer__ggml__eos_token_id=2,
        **changes,
    )


def sentence_piece_ids(text: str) -> list[int]:
    """SentencePiece's BPE: join the neighbours whose union has the best score, leftmost first."""
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    rank = {word: i for i, word in enumerate(SPM_WORDS)}
    while len(parts) > 1:
        best, at = min(
            (rank.get(left + right, 1 << 60), i) for i, (left, right) in enumerate(pairwise(parts))
        )
        if best == 1 << 60:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = []
    for part in parts:
        ids += [SPM_TOKENS.index(f"<0x{b:02X}>") for b in part.encode()] if part not in rank else []
        ids += [len(SPM_TOKENS) + rank[part]] if part in rank else []
    return ids


def test_sentence_piece_vocabularies_encode_by_score(make: Any) -> None:
    tokenizer = load_tokenizer(resolve(str(sentence_piece_gguf(make))))
    rng = random.Random(1)
    texts = ["", "abc", " abc", "ab cd", "xyz", "é😀", "a\nb"]
    texts += ["".join(rng.choices("abcd  éx", k=12)) for _ in range(200)]
    for text in texts:
        ids = sentence_piece_ids(text)
        assert tokenizer.encode(text, add_special=False) == ids, text
        assert tokenizer.encode(text, add_special=True) == [1, *ids]
        assert tokenizer.decode([1, *ids, 2]) == text


def test_sentence_piece_without_a_space_prefix(make: Any) -> None:
    tokenizer = load_tokenizer(
        resolve(str(sentence_piece_gguf(make, tokenizer__ggml__add_space_prefix=False)))
    )
    assert not tokenizer.strips_first_space
    for text in ("abc", " abc", "a b"):
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
    assert tokenizer.encode("abc", add_special=False) == [len(SPM_TOKENS) + SPM_WORDS.index("abc")]
