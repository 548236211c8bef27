"""Text to token ids and back, for every kind of model.

Encoding is the `tokenizers` library's. Decoding is done here, on a table of each token's bytes: it is a join
and one UTF-8 decoding, the same for a whole completion and for one token of a stream (detokenizer.py). Where
ids make ill-formed UTF-8, each maximal ill-formed part becomes U+FFFD.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers.decoders import Decoder

from ..proto.errors import CheckpointError, InvalidRequest
from .directory import TOKENIZER
from .dummy import byte_tokenizer
from .gguf import GgufFile
from .gguf_tokenizer import build_tokenizer
from .model_files import ModelFiles, ModelKind

LONG_TEXT = 4096
"""Characters. Text from here on is worth a thread: it takes milliseconds, and other threads run meanwhile."""

_SPACE = "▁"


class Tokenizer:
    """One model's tokenizer. Immutable; safe to share between threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        model_vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        where: str,
    ) -> None:
        """`model_vocab_size` is the width of the logits, which may exceed the number of tokens; `where` names
        the tokenizer in errors.

        Raises:
            CheckpointError: the tokenizer has more tokens than the model, or joins tokens into text in a way
                that is not known here.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        """Number of tokens."""
        self.eos_token_ids = tuple(eos_token_ids)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if vocabulary and max(vocabulary.values()) >= model_vocab_size:
            raise CheckpointError(
                f"{where} has token ids up to {max(vocabulary.values())}, but the model only "
                f"{model_vocab_size} tokens; tokenizer and weights are of different models"
            )
        spelling = _Spelling(backend.decoder, where)
        self.strips_first_space = spelling.strips_first_space
        """Whether text that begins with these tokens loses their first space."""
        self._all_pieces = [b""] * model_vocab_size
        for token, token_id in vocabulary.items():
            self._all_pieces[token_id] = spelling.piece(token)
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.pieces = list(self._all_pieces)
        """Bytes of text that each id stands for; none for special tokens and for ids beyond the
        tokenizer's."""
        for token_id in self.special_token_ids:
            self.pieces[token_id] = b""
        self.longest_token = max(1, *map(len, self._all_pieces))
        """Bytes of text that one token stands for at most, special tokens as they are spelled."""

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Token ids of a text; with `add_special` the model's own, such as a beginning-of-sequence token, are
        put around it. Special tokens that are spelled out in the text are recognised. Lone surrogates, which
        are no characters, count as U+FFFD."""
        try:
            return self._encode(text, add_special)
        except TypeError:  # what the library says of surrogates
            repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._encode(repaired, add_special)

    def _encode(self, text: str, add_special: bool) -> list[int]:
        # The library lets go of the interpreter lock for batches only; and it computes those in a pool of
        # threads, where a short text would have to wait for the long ones of others.
        if len(text) < LONG_TEXT:
            return self._backend.encode(text, add_special_tokens=add_special).ids
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special)[0].ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of a whole sequence, special tokens left out.

        Raises:
            InvalidRequest: an id is outside the model's vocabulary.
        """
        text = self.join(token_ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_first_space else text

    def join(self, token_ids: Iterable[int]) -> bytes:
        """The bytes of text that ids stand for, special tokens left out; not always whole characters.

        Raises:
            InvalidRequest: an id is outside the model's vocabulary.
        """
        pieces = self.pieces
        try:
            return b"".join([pieces[token_id] for token_id in token_ids])
        except IndexError:
            raise InvalidRequest(f"a token id is outside the model's vocabulary of {len(pieces)}") from None

    def token_bytes(self, token_id: int) -> bytes:
        """What one token spells, special tokens too.

        Raises:
            InvalidRequest: the id is outside the model's vocabulary.
        """
        if not 0 <= token_id < len(self._all_pieces):
            raise InvalidRequest(
                f"token id {token_id} is outside the model's vocabulary of {len(self._all_pieces)}"
            )
        return self._all_pieces[token_id]

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None when there is none."""
        return self._backend.token_to_id(token)


class _Spelling:
    """How a tokenizer's decoder reads its tokens. Found by trying it: libraries differ in how they compose
    the same decoder, not in what it does."""

    def __init__(self, decoder: Decoder | None, where: str) -> None:
        def tried(*tokens: str) -> str | None:
            return None if decoder is None else decoder.decode(list(tokens))

        self._bytes_of = {character: byte for byte, character in _byte_level_alphabet().items()}
        self._byte_level = tried("Ġa", "Ċ", "Ã", "©") == " a\né"
        self._fallback = tried("x", "<0x41>") == "xA"
        stripped = tried("▁▁a", "▁b▁")
        self.strips_first_space = stripped in (" a b ", "a b ")
        sentence_piece = tried("x", "▁a", "b") == "x ab" and (self.strips_first_space or stripped == "  a b ")
        if not self._byte_level and not sentence_piece:
            raise CheckpointError(
                f"{where} joins tokens in a way that is not known; "
                "byte-level and SentencePiece tokenizers are supported"
            )

    def piece(self, token: str) -> bytes:
        """The bytes that a token stands for inside a text."""
        if self._byte_level:
            try:
                return bytes([self._bytes_of[character] for character in token])
            except KeyError:  # an added token that is spelled as it reads
                return token.encode()
        if self._fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                return token.encode()
        return token.replace(_SPACE, " ").encode()


def _byte_level_alphabet() -> dict[int, str]:
    """Byte -> character of byte-level BPE (GPT-2): printable Latin-1 stands for itself, the others for the
    characters from 256 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(shifted)}


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer of a resolved model.

    Raises:
        CheckpointError: it cannot be read, or is of a kind that is not supported.
    """
    if files.path is None:
        backend, where = byte_tokenizer(files.config.vocab_size), files.name
    elif files.kind is ModelKind.GGUF:
        backend, where = build_tokenizer(GgufFile(files.path)), str(files.path)
    else:
        path = files.path / TOKENIZER
        backend, where = _read_backend(path), str(path)
    return Tokenizer(
        backend,
        model_vocab_size=files.config.vocab_size,
        eos_token_ids=files.config.eos_token_ids,
        where=where,
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
