from __future__ import annotations

import os
import random
import sys
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import regex
import tokenizers
from diphase.checkpoints.gguf import GgufFile
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.model_files import ModelFiles
from diphase.checkpoints.tokenizer import LONG_TEXT, Tokenizer, load_tokenizer
from diphase.proto.errors import CheckpointError, InvalidRequest
from tokenizers import AddedToken, decoders, models, normalizers

TEXTS = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "Hello, world!",
    "The capital of France is",
    "  leading and trailing  ",
    "a  b   c    d\t\te",
    "tabs\t\t1 and spaces  2",
    "12345 6.78 0x1F 1e-05",
    "１２３ ² ½ Ⅳ ④",
    "I'm you're WE'LL they'd 'tis",
    "snake_case camelCase kebab-case",
    "def f(x):\n    return x ** 2  # squared\n",
    "for (int i = 0; i < 10; ++i) { sum += a[i]; }",
    "https://example.org/a?b=c&d=%20#e",
    '{"key": [1, 2.5, null, "väl\\u00fce"]}',
    "naïve café façade Ångström",
    "e\u0301 combining",
    "Привет, мир",
    "γειά σου",
    "你好，世界！",
    "日本語テキスト",
    "한국어 텍스트",
    "مرحبا بالعالم",
    "שלום",
    "नमस्ते",
    "😀👍🏽🏳️‍🌈👨‍👩‍👧",
    "mixed 😀 and text",
    "\u200b\ufeff\u00a0",
    "\r\n\r\n",
    "¿Qué? ¡Sí!",
    "“quotes” ‘and’ — dashes…",
    "ﬁ ligature ß ẞ",
    "ALL CAPS AND lower",
    "word" * 50,
    "x" * 300,
    "!@#$%^&*()_+-=[]{}|;':\",./<>?",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|>",
    "broken <|im_star special",
    "<repo_name>diphase<file_sep>a.py",
    "Ġ is not a space, Ċ no newline",
    "a\u2028b\u2029c\x0bd\x0ce\x85f",
    "\U0001f1e6\U0001f1f9 flags",
    "∑ ∫ √ ≤ ≠ ∞",
    "Ünïcödé",
    "$100, €50, £20, ¥1000",
    "3.14159265358979",
    "The quick brown fox jumps over the lazy dog. " * 5,
]

_GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
_LLAMA3 = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def spelled(data: bytes) -> str:
    """GPT-2's characters for bytes, by its own recipe."""
    plain = list(range(ord("!"), ord("~") + 1)) + list(range(ord("¡"), ord("¬") + 1))
    plain += list(range(ord("®"), ord("ÿ") + 1))
    others = [byte for byte in range(256) if byte not in plain]
    return "".join(chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in data)


class ReferenceBpe:
    """Byte-level BPE with nothing but the vocabulary's own rules: split, then join the pair of least rank."""

    def __init__(self, tokens: list[str], merges: list[str], special: list[str], kind: str) -> None:
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.special = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
        self.kind = kind

    def encode(self, text: str) -> list[int]:
        ids = []
        for i, part in enumerate(self.special.split(text)):
            if i % 2:
                ids.append(self.ids[part])
                continue
            for word in self.words(part):
                ids += self.join(list(spelled(word.encode())))
        return ids

    def words(self, text: str) -> list[str]:
        if self.kind == "llama-bpe":
            return list(_LLAMA3.findall(text))
        stretches = regex.split(r"(\p{N})", text) if self.kind == "smollm" else [text]
        return [word for stretch in stretches for word in _GPT2.findall(stretch)]

    def join(self, parts: list[str]) -> list[int]:
        if self.kind == "llama-bpe" and "".join(parts) in self.ids:
            return [self.ids["".join(parts)]]
        while len(parts) > 1:
            rank, at = min((self.ranks.get(pair, 1 << 60), i) for i, pair in enumerate(pairwise(parts)))
            if rank == 1 << 60:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts if part in self.ids]


def test_the_built_in_model_encodes_as_its_vocabulary_says(
    smollm2: ModelFiles, smollm2_gguf: ModelFiles
) -> None:
    metadata: Any = GgufFile(smollm2_gguf.weight_files[0]).metadata
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    reference = ReferenceBpe(tokens, merges, tokens[:17], "smollm")
    converted, direct = load_tokenizer(smollm2), load_tokenizer(smollm2_gguf)
    rng = random.Random(0)
    alphabet = ["a", "the", " ", "  ", "1", "é", "日", "😀", "\n", "\t", "'s", "ing", "<|im_end|>", "_", "²"]
    drawn = ["".join(rng.choices(alphabet, k=30)) for _ in range(100)]
    for text in TEXTS + drawn:
        expected = reference.encode(text)
        assert converted.encode(text, add_special=True) == expected, text
        assert direct.encode(text, add_special=True) == expected, text


@pytest.mark.parametrize("kind", ["smollm", "gpt-2", "llama-bpe"])
def test_every_way_of_splitting_text_is_as_defined(make: Any, kind: str) -> None:
    path = make.gguf(tokenizer__ggml__pre=kind, tokenizer__ggml__add_bos_token=False)
    metadata: Any = GgufFile(path).metadata
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    reference = ReferenceBpe(tokens, merges, tokens[:3], kind)
    tokenizer = load_tokenizer(resolve(str(path)))
    for text in [*TEXTS, "the 123 12 in 1212 her", "unused7 THE'S"]:
        assert tokenizer.encode(text, add_special=True) == reference.encode(text), text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"tokenizer__ggml__add_bos_token": True}, [0]),
        ({"tokenizer__ggml__pre": "llama-bpe"}, [0]),
        ({"tokenizer__ggml__pre": "llama-bpe", "tokenizer__ggml__add_bos_token": False}, []),
        ({"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": None}, []),
    ],
)
def test_the_first_token_is_added_where_the_file_says(
    make: Any, changes: dict[str, Any], expected: list[int]
) -> None:
    tokenizer = load_tokenizer(resolve(str(make.gguf(**changes))))
    plain = tokenizer.encode("a", add_special=False)
    assert tokenizer.encode("a", add_special=True) == expected + plain
    assert tokenizer.decode(expected + plain) == "a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer__ggml__model": "bert"}, "tokenizer of kind 'bert'"),
        ({"tokenizer__ggml__pre": "deepseek-llm"}, "splits text as 'deepseek-llm'"),
        ({"tokenizer__ggml__tokens": None}, "lacks tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__merges": None}, "lacks tokenizer.ggml.merges"),
        ({"tokenizer__ggml__merges": ["ab"]}, "has the merge 'ab'"),
        ({"tokenizer__ggml__tokens": ["a", "b", "a"]}, "has the token 'a' twice"),
        ({"tokenizer__ggml__merges": ["zz qq"]}, "merges that cannot be used"),
        ({"tokenizer__ggml__token_type": np.array([1], np.int32)}, "lacks tokenizer.ggml.token_type"),
        ({"tokenizer__ggml__model": "llama"}, "lacks tokenizer.ggml.scores"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_named(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(resolve(str(make.gguf(**changes))))


def test_decoding_equals_the_librarys_on_the_built_in_model(smollm2: ModelFiles) -> None:
    assert smollm2.path is not None
    library = tokenizers.Tokenizer.from_file(str(smollm2.path / "tokenizer.json"))
    tokenizer = load_tokenizer(smollm2)
    rng = random.Random(2)
    sequences = [tokenizer.encode(text, add_special=True) for text in TEXTS]
    sequences += [rng.choices(range(300), k=40) for _ in range(300)]  # bytes: mostly ill-formed
    sequences += [rng.choices(range(tokenizer.vocab_size), k=40) for _ in range(300)]
    for ids in sequences:
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_text_survives_where_the_vocabulary_has_all_its_bytes(smollm2: ModelFiles) -> None:
    tokenizer = load_tokenizer(smollm2)
    for text in TEXTS:
        if "<|im" not in text and "<repo" not in text and "\x85" not in text:
            assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
        decoders.Metaspace(),
    ],
)
def test_decoders_of_sentence_piece_models_are_known(decoder: Any) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"▁a": 0, "▁b": 1, "c": 2, "<s>": 3}, merges=[]))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer = Tokenizer(backend, model_vocab_size=4, where="here")
    for ids in ([0, 2, 1], [3, 1, 0], [2, 0], []):
        assert tokenizer.decode(ids) == backend.decode(ids)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.BPEDecoder()])
def test_an_unknown_way_of_joining_tokens_is_an_error(decoder: Any) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(CheckpointError, match="here joins tokens in a way that is not known"):
        Tokenizer(backend, model_vocab_size=1, where="here")


def test_a_long_text_has_the_tokens_of_a_short_one(smollm2: ModelFiles) -> None:
    tokenizer = load_tokenizer(smollm2)
    text = "\n".join(TEXTS)
    assert len(text) < LONG_TEXT
    times = LONG_TEXT // len(text) + 1
    ids = tokenizer.encode(text + "<|im_end|>", add_special=True)
    assert tokenizer.encode((text + "<|im_end|>") * times, add_special=True) == ids * times
    surrogates = "a\ud800" * LONG_TEXT
    assert tokenizer.encode(surrogates, False) == tokenizer.encode("a\ufffd" * LONG_TEXT, False)


def test_other_threads_run_while_a_long_text_is_tokenised(smollm2: ModelFiles) -> None:
    tokenizer = load_tokenizer(smollm2)
    begun, ended = [], []

    def work() -> None:
        begun.append(True)
        tokenizer.encode("0123456789" * 50_000, False)
        ended.append(True)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # threads take turns only where one lets go of the interpreter lock
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while not begun:
            os.sched_yield()
        assert not ended
    finally:
        sys.setswitchinterval(interval)
    thread.join()


def test_the_longest_token_may_be_a_special_one(smollm2: ModelFiles) -> None:
    assert load_tokenizer(smollm2).longest_token == 81
    assert load_tokenizer(resolve("dummy:tiny")).longest_token == len("<|bos|>")


def test_lone_surrogates_count_as_replacement_characters(smollm2: ModelFiles) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.encode("a\ud800b\udc00", False) == tokenizer.encode("a\ufffdb\ufffd", False)
    assert tokenizer.encode("\ud83d\ude00", False) == tokenizer.encode("😀", False)  # a pair is a character


def test_a_tokenizer_with_more_tokens_than_the_model_is_an_error(make: Any) -> None:
    weights = {
        name: values[:300] if name in ("model.embed_tokens.weight", "lm_head.weight") else values
        for name, values in make.weights.items()
    }
    path = make.directory(weights=weights, config=make.config(vocab_size=300))
    with pytest.raises(CheckpointError, match="ids up to 319, but the model only 300 tokens"):
        load_tokenizer(resolve(str(path)))


def test_ids_beyond_the_tokenizer_carry_no_text_and_beyond_the_model_are_refused(make: Any) -> None:
    backend = make.tokenizer()
    tokenizer = Tokenizer(backend, model_vocab_size=backend.get_vocab_size() + 8, where="here")
    last = backend.get_vocab_size() + 7
    assert tokenizer.decode([last]) == ""
    assert tokenizer.token_bytes(last) == b""
    with pytest.raises(InvalidRequest, match="outside the model's vocabulary of 328"):
        tokenizer.decode([last + 1])
    for token_id in (last + 1, -1):
        with pytest.raises(InvalidRequest, match=f"token id {token_id} is outside"):
            tokenizer.token_bytes(token_id)


def test_special_tokens_have_bytes_of_their_own_but_no_text(make: Any) -> None:
    tokenizer = load_tokenizer(resolve(str(make.directory())))
    assert tokenizer.special_token_ids == {0, 1}
    assert tokenizer.token_bytes(1) == b"<|im_end|>"
    assert tokenizer.decode([0, 1]) == ""
    assert tokenizer.decode(tokenizer.encode("x<tool>y", False)) == "x<tool>y"  # added, but not special
    assert tokenizer.token_id("<tool>") == 2
    assert tokenizer.token_id("absent") is None
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (320, (1,))


def test_truncation_and_padding_of_the_file_are_not_applied(make: Any) -> None:
    path = make.directory()
    backend = make.tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(path / "tokenizer.json"))
    assert len(load_tokenizer(resolve(str(path))).encode("abcdefghij", False)) == 10


def test_a_file_that_is_no_tokenizer_is_an_error(make: Any) -> None:
    path = make.directory()
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(resolve(str(path)))


def test_a_normaliser_of_the_file_is_applied(make: Any) -> None:
    path = make.directory()
    backend = make.tokenizer()
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(path / "tokenizer.json"))
    tokenizer = load_tokenizer(resolve(str(path)))
    assert tokenizer.encode("THE", False) == tokenizer.encode("the", False)
