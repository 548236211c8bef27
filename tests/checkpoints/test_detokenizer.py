from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from diphase.checkpoints.detokenizer import IncrementalDetokenizer
from diphase.checkpoints.tokenizer import Tokenizer
from diphase.proto.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers


def byte_level() -> Tokenizer:
    """All bytes, a few longer tokens that begin or end inside characters, two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    mapped = {bytes([b]): c for b, c in zip(range(0x21, 0x7F), map(chr, range(0x21, 0x7F)), strict=True)}
    assert mapped[b"A"] in alphabet
    joined = ["Ġthe", "ðŁ", "ĺĢ", "æĹ¥", "aÃ", "©b"]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, *joined])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return Tokenizer(backend, model_vocab_size=len(vocabulary), where="here")


def sentence_piece() -> Tokenizer:
    tokens = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁a", "▁▁", "b", "é", "▁日", "😀"]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return Tokenizer(backend, model_vocab_size=len(tokens), where="here")


TOKENIZERS = {"byte_level": byte_level(), "sentence_piece": sentence_piece()}


def in_steps(tokenizer: Tokenizer, steps: list[list[int]], *, at_start: bool) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, at_start=at_start)
    return "".join([*(detokenizer.push(step) for step in steps), detokenizer.flush()])


def steps_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[list[int]]]:
    top = tokenizer.vocab_size - 1
    near_the_top = st.integers(max(top - 8, 0), top)  # the longer tokens, which are few
    return st.lists(st.lists(st.one_of(st.integers(0, top), near_the_top), max_size=4), max_size=12)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_any_split_gives_the_text_of_all_ids(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    steps = data.draw(steps_of(tokenizer))
    ids = [token_id for step in steps for token_id in step]
    assert in_steps(tokenizer, steps, at_start=True) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_a_completion_is_what_follows_the_prompts_text(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    steps = data.draw(steps_of(tokenizer))
    prompt = [tokenizer.token_id("b")]
    assert prompt[0] is not None
    ids = [token_id for step in steps for token_id in step]
    assert "b" + in_steps(tokenizer, steps, at_start=False) == tokenizer.decode([prompt[0], *ids])


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(max_size=20))
def test_text_arrives_as_soon_as_its_character_is_complete_and_never_half(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    spelled = "<0x{:02X}>" if kind == "sentence_piece" else None
    detokenizer = IncrementalDetokenizer(tokenizer)
    for character in text:
        data = character.encode()
        ids = [
            tokenizer.token_id(spelled.format(byte)) if spelled else tokenizer.pieces.index(bytes([byte]))
            for byte in data
        ]
        pushed = [detokenizer.push([token_id]) for token_id in ids if token_id is not None]
        assert pushed == [""] * (len(data) - 1) + [character]
    assert detokenizer.flush() == ""


def test_special_tokens_are_skipped_even_inside_a_character() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    first, second = tokenizer.token_id("ðŁ"), tokenizer.token_id("ĺĢ")
    assert first is not None
    assert second is not None
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push([token_id]) for token_id in (0, first, 1, second, 0)] == ["", "", "", "😀", ""]


def test_an_unfinished_character_is_replaced_at_the_end_or_when_it_breaks_off() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    first, ascii_id = tokenizer.token_id("ðŁ"), tokenizer.token_id("b")
    assert first is not None
    assert ascii_id is not None
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([first]) == ""
    assert detokenizer.push([ascii_id]) == "\ufffdb"
    assert detokenizer.push([first]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_a_completions_first_space_is_kept_and_a_texts_is_not() -> None:
    tokenizer = TOKENIZERS["sentence_piece"]
    ids = [tokenizer.token_id(token) for token in ("▁a", "▁a", "b")]
    steps = [[token_id] for token_id in ids if token_id is not None]
    assert in_steps(tokenizer, steps, at_start=False) == " a ab"
    assert in_steps(tokenizer, [[], *steps], at_start=True) == "a ab"
    assert in_steps(tokenizer, [[1], *steps], at_start=True) == "a ab"


@pytest.mark.parametrize("step", [[10_000], [2, 10_000]])
def test_ids_outside_the_vocabulary_are_refused(step: list[int]) -> None:
    detokenizer: Any = IncrementalDetokenizer(TOKENIZERS["byte_level"])
    with pytest.raises(InvalidRequest, match="outside the model's vocabulary"):
        detokenizer.push(step)
