"""A tokenizer made of the vocabulary in a GGUF file: byte-level BPE, or SentencePiece's BPE from its scores.

The result is the tokenizer that the model's tokenizer.json describes: same ids for the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ..proto.errors import CheckpointError
from .gguf import GgufFile

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""Token types of llama.cpp: made by merges, invisible in the output, text that is never split."""
_SPACE = "▁"
_MAX_TOKEN = 4096
"""Characters; finding the merges takes the square of a token's length."""
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_KINDS = ("llama-bpe", "llama3", "llama-v3")
_SPECIAL_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def build_tokenizer(gguf: GgufFile) -> tokenizers.Tokenizer:
    """The tokenizer of a .gguf file.

    Raises:
        CheckpointError: the vocabulary lacks or is of a kind that is not known here.
    """
    tokens = _strings(gguf, "tokenizer.ggml.tokens")
    kind = gguf.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(gguf, tokens)
    elif kind == "llama":
        tokenizer = _sentence_piece(gguf, tokens)
    else:
        raise CheckpointError(
            f"{gguf.path} has a tokenizer of kind {kind!r}; only gpt2 (byte-level BPE) and llama "
            "(SentencePiece BPE) are supported; use the Hugging Face checkpoint"
        )
    _add_special_tokens(tokenizer, gguf, tokens)
    bos = special_tokens(gguf).get("bos_token")
    if bos is not None and gguf.metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(gguf)):
        # The template has syntax of its own, in which a token like ":" would be an error.
        token: Any = {"id": "bos", "ids": [tokenizer.token_to_id(bos)], "tokens": [bos]}
        tokenizer.post_processor = processors.TemplateProcessing(single=["bos", "$A"], special_tokens=[token])
    return tokenizer


def special_tokens(gguf: GgufFile) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token, as far as the file names them."""
    tokens = _strings(gguf, "tokenizer.ggml.tokens")
    found: dict[str, str] = {}
    for name, key in _SPECIAL_KEYS.items():
        token_id = gguf.metadata.get(key)
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            found[name] = tokens[token_id]
    return found


def _adds_bos(gguf: GgufFile) -> bool:
    """What llama.cpp assumes when the file does not say."""
    return (
        gguf.metadata.get("tokenizer.ggml.model") == "llama"
        or gguf.metadata.get("tokenizer.ggml.pre") in _LLAMA3_KINDS
    )


def _byte_level(gguf: GgufFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    merges = [_split_merge(gguf, merge) for merge in _strings(gguf, "tokenizer.ggml.merges")]
    kind = gguf.metadata.get("tokenizer.ggml.pre")
    splitters: list[pre_tokenizers.PreTokenizer]
    match kind:
        case "smollm":
            splitters = [pre_tokenizers.Digits(individual_digits=True), _byte_map(use_regex=True)]
        case "gpt-2":
            splitters = [_byte_map(use_regex=True)]
        case _ if kind in _LLAMA3_KINDS:
            splitters = [
                pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
                _byte_map(use_regex=False),
            ]
        case _:
            raise CheckpointError(
                f"{gguf.path} splits text as {kind!r}; only smollm, gpt-2 and {', '.join(_LLAMA3_KINDS)} are "
                "supported; use the Hugging Face checkpoint"
            )
    tokenizer = _bpe(gguf, tokens, merges, ignore_merges=kind in _LLAMA3_KINDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_map(*, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split_merge(gguf: GgufFile, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or not left or not right:
        raise CheckpointError(
            f"{gguf.path} has the merge {merge!r}; it must be two tokens with a space between"
        )
    return left, right


def _sentence_piece(gguf: GgufFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    scores = gguf.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not isinstance(scores[0], float):
        raise CheckpointError(f"{gguf.path} lacks tokenizer.ggml.scores, one for each token")
    if (longest := max(map(len, tokens))) > _MAX_TOKEN:
        raise CheckpointError(
            f"{gguf.path} has a token of {longest} characters; at most {_MAX_TOKEN} are read"
        )
    merges = _merges_by_score(tokens, scores, _token_types(gguf, tokens))
    unknown = special_tokens(gguf).get("unk_token")
    tokenizer = _bpe(gguf, tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefixed = bool(gguf.metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), replace] if prefixed else [replace]
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def _merges_by_score(
    tokens: Sequence[str], scores: Sequence[object], types: Sequence[object]
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the best score; as BPE merges these are all splits
    of all normal tokens into two, best union first (as transformers converts them, generate_merges)."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] == _NORMAL}
    ranked: list[tuple[tuple[float, int, int, int, int], str, str]] = []
    for token, i in ids.items():
        score = float(str(scores[i]))
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append(((-score, -len(left), -len(right), ids[left], ids[right]), left, right))
    ranked.sort()
    return [(left, right) for _, left, right in ranked]


def _add_special_tokens(tokenizer: tokenizers.Tokenizer, gguf: GgufFile, tokens: Sequence[str]) -> None:
    control, user_defined = (
        [
            AddedToken(token, special=wanted == _CONTROL, normalized=False)
            for token, kind in zip(tokens, _token_types(gguf, tokens), strict=True)
            if kind == wanted
        ]
        for wanted in (_CONTROL, _USER_DEFINED)
    )
    # All at once: each call costs the time of all tokens that were added before.
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user_defined)


def _token_types(gguf: GgufFile, tokens: Sequence[str]) -> Sequence[object]:
    types = gguf.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(f"{gguf.path} lacks tokenizer.ggml.token_type, one for each token")
    return types


def _bpe(
    gguf: GgufFile, tokens: Sequence[str], merges: Sequence[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise CheckpointError(f"{gguf.path} has the token {twice!r} twice")
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=ids, merges=list(merges), **options))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{gguf.path} has merges that cannot be used: {error}") from error


def _strings(gguf: GgufFile, key: str) -> list[str]:
    value = gguf.metadata.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise CheckpointError(f"{gguf.path} lacks {key}; its tokenizer cannot be built")
    return value
