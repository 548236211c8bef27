"""Sampling parameters: the one dataclass that gateway, worker and sampler share, and its range checks."""

from __future__ import annotations

from dataclasses import dataclass

from . import inference_pb2 as pb
from .errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MIN_TEMPERATURE = 1e-3
"""Of sampling. It makes the most likely token all but certain already, and logits divided by much less leave
the range of numbers."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.1, 10.0
"""Divisor and factor of logits: the most that either may change them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. Every value that passes keeps the arithmetic of the sampler finite."""

    max_tokens: int = 256
    """Most tokens to generate, at least 1."""
    min_tokens: int = 0
    """Before this many tokens, eos and stop tokens are not sampled."""
    temperature: float = 0.0
    """0 is greedy: the highest logit, ties to the lowest id. Else 0.001 to 100."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probability reaches this."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (CTRL, 2019);
    0.1 to 10, 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the output has."""
    frequency_penalty: float = 0.0
    """Subtracted for each occurrence in the output."""
    seed: int = 0
    """The random numbers of token i are a function of (seed, i) alone."""
    stop: tuple[str, ...] = ()
    """Text that ends the output; matched by the gateway."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: no log-probabilities; n: the chosen token's and the n most likely."""

    def __post_init__(self) -> None:
        _range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _range("min_tokens", self.min_tokens, 0, self.max_tokens, hint=" (max_tokens)")
        if self.temperature != 0.0:
            _range("temperature", self.temperature, MIN_TEMPERATURE, 100.0, hint=", or 0 for greedy")
        _range("top_k", self.top_k, 0, 2**31 - 1)
        _range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _range("min_p", self.min_p, 0.0, 1.0)
        _range(
            "repetition_penalty",
            self.repetition_penalty,
            MIN_REPETITION_PENALTY,
            MAX_REPETITION_PENALTY,
            hint="; 1 is off",
        )
        _range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _range("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _few("stop", len(self.stop), MAX_STOP_STRINGS, "strings")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise InvalidRequest(
                    f"sampling.stop has a string of {len(text)} characters; each needs 1 to {MAX_STOP_LENGTH}"
                )
        _few("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKENS, "ids")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)


def _range(
    name: str, value: float, low: float, high: float, *, open_low: bool = False, hint: str = ""
) -> None:
    # Not a number is inside of nothing.
    inside = low < value <= high if open_low else low <= value <= high
    if not inside:
        bracket = "(" if open_low else "["
        raise InvalidRequest(f"sampling.{name} = {value} is out of range; use {bracket}{low}, {high}]{hint}")


def _few(name: str, number: int, most: int, what: str) -> None:
    if number > most:
        raise InvalidRequest(f"sampling.{name} has {number} {what}; send at most {most}")


_SCALARS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
)


def sampling_from_proto(message: pb.Sampling) -> SamplingParams:
    """Checked parameters; absent fields take the dataclass's defaults.

    Raises:
        InvalidRequest: a value is out of range; the message names the field and the range.
    """
    # Millions of them fit a message: counted before they become objects.
    _few("stop", len(message.stop), MAX_STOP_STRINGS, "strings")
    _few("stop_token_ids", len(message.stop_token_ids), MAX_STOP_TOKENS, "ids")
    given = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    return SamplingParams(
        **given,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def sampling_to_proto(params: SamplingParams) -> pb.Sampling:
    """The complete message: every field set (logprobs only where asked for)."""
    message = pb.Sampling(
        stop=params.stop, stop_token_ids=params.stop_token_ids, ignore_eos=params.ignore_eos
    )
    for name in _SCALARS:
        value = getattr(params, name)
        if value is not None:
            setattr(message, name, value)
    return message
