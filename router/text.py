"""Text in and out: a client's request becomes checked token ids, and token ids become text.

Everything a client can get wrong is found here, before anything was spent on it. Workers see token ids only.
What can be refused by its size alone is; text that takes long is rendered and tokenised beside the event
loop, so that one client's does not hold up the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ..checkpoints.chat_template import ChatTemplate, load_chat_template
from ..checkpoints.detokenizer import IncrementalDetokenizer
from ..checkpoints.model_files import ModelFiles
from ..checkpoints.tokenizer import LONG_TEXT, Tokenizer, load_tokenizer
from ..proto import inference_pb2 as pb
from ..proto.clock import Clock, Rng
from ..proto.errors import InvalidRequest, NotFound, Overloaded, PromptTooLong
from ..proto.ids import check_request_id, draw_id
from ..proto.sampling import sampling_from_proto, sampling_to_proto
from ..proto.slo import Slo, slo_from_proto
from .stop_strings import StopMatcher

MAX_CHECKED_SAMPLINGS = 1024
MAX_CHECKED_SAMPLING_BYTES = 1024
"""Of each; a larger one is checked every time."""
TEXT_THREADS = 2
"""Each may hold the interpreter lock for 5 ms before the event loop gets it: few."""
MAX_WAITING_TEXT = 64 * 1024 * 1024
"""Bytes of long texts that wait for those threads."""
MESSAGE_FRAME_BYTES = 15
"""What the wire adds to one chat message: three tags, three lengths."""
REQUEST_FRAME_BYTES = 64 * 1024
"""More than everything in a request but its input."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a gateway needs of the model that its cluster serves."""

    name: str
    context_length: int
    """Tokens, prompt and completion together."""
    vocab_size: int
    tokenizer: Tokenizer
    chat_template: ChatTemplate

    @classmethod
    def load(cls, files: ModelFiles) -> ServedModel:
        """Raises:
        CheckpointError: the tokenizer or the chat template cannot be read.
        """
        return cls(
            name=files.name,
            context_length=files.config.context_length,
            vocab_size=files.config.vocab_size,
            tokenizer=load_tokenizer(files),
            chat_template=load_chat_template(files),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request that is in order."""

    request_id: str
    """Drawn here: no two requests of a cluster share it, whatever their clients call them."""
    client_request_id: str
    prompt_token_ids: list[int]
    sampling: pb.Sampling
    """Checked and complete; max_tokens fits the context."""
    slo: Slo
    received_at: float
    """Gateway clock, seconds."""
    tokenised_at: float


class TextProcessor:
    """Checks and tokenises requests for one model."""

    def __init__(self, model: ServedModel, default_slo: Slo, clock: Clock, rng: Rng) -> None:
        self.model = model
        self.default_slo = default_slo
        self._clock = clock
        self._rng = rng
        self._checked_samplings: dict[bytes, pb.Sampling] = {}
        self._threads = ThreadPoolExecutor(TEXT_THREADS, "text")
        self._waiting_text = 0
        self._max_text = model.context_length * model.tokenizer.longest_token
        """Bytes: no context holds more, however they are cut into tokens."""
        self._max_request = self._max_text + model.context_length * MESSAGE_FRAME_BYTES + REQUEST_FRAME_BYTES

    def check_size(self, num_bytes: int) -> None:
        """To be asked before a request is parsed, which takes long where millions of small things are in it.

        Raises:
            PromptTooLong: no request of so many bytes can fit the model's context.
        """
        if num_bytes > self._max_request:
            raise PromptTooLong(
                f"the request has {num_bytes} bytes; {self._max_request} are enough for all that fits the "
                f"model's context of {self.model.context_length} tokens, each at most "
                f"{self.model.tokenizer.longest_token} bytes of text: shorten the prompt"
            )

    async def prepare(self, message: pb.GenerateRequest, received_at: float) -> PreparedRequest:
        """Raises:
        InvalidRequest: something about the request can never work; the message says what to change.
        NotFound: it names another model.
        """
        request_id = draw_id(self._rng)
        client_request_id = check_request_id(message.request_id) if message.request_id else request_id
        if message.model and message.model != self.model.name:
            raise NotFound(
                f"this cluster serves model {self.model.name!r}, not {message.model[:200]!r}; "
                "leave the model empty or name that one"
            )
        sampling = self._check_sampling(message.sampling)
        slo = slo_from_proto(message.slo, self.default_slo)
        token_ids = await self._token_ids(message)
        self._fit(sampling, len(token_ids))
        return PreparedRequest(
            request_id=request_id,
            client_request_id=client_request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            slo=slo,
            received_at=received_at,
            tokenised_at=self._clock.now(),
        )

    def check_resume(self, message: pb.GenerateRequest) -> str:
        """The request_id to re-attach to.

        Raises:
            InvalidRequest: it is missing, or something else is given with it.
        """
        if not message.request_id:
            raise InvalidRequest("resume_from needs the request_id of the request to re-attach to")
        if message.WhichOneof("input") or message.HasField("sampling") or message.HasField("slo"):
            raise InvalidRequest(
                "resume_from re-attaches to a running request; send no input, sampling or slo"
            )
        return check_request_id(message.request_id)

    def stream(self, sampling: pb.Sampling) -> TextStream:
        """The text of one completion, from its first token."""
        return TextStream(IncrementalDetokenizer(self.model.tokenizer), sampling.stop, sampling.min_tokens)

    def _check_sampling(self, given: pb.Sampling) -> pb.Sampling:
        """The complete message with a seed drawn where none was given. Clients send the same few messages
        over and over: what was checked is remembered."""
        key = given.SerializeToString(deterministic=True)
        complete = self._checked_samplings.get(key)
        if complete is None:
            params = sampling_from_proto(given)
            self._check_ids("sampling.stop_token_ids", params.stop_token_ids)
            complete = sampling_to_proto(params)
            if len(self._checked_samplings) >= MAX_CHECKED_SAMPLINGS:
                self._checked_samplings.clear()
            if len(key) <= MAX_CHECKED_SAMPLING_BYTES:
                self._checked_samplings[key] = complete
        sampling = pb.Sampling()
        sampling.CopyFrom(complete)
        if not given.HasField("seed"):
            sampling.seed = self._rng.getrandbits(64)
        return sampling

    async def _token_ids(self, message: pb.GenerateRequest) -> list[int]:
        match message.WhichOneof("input"):
            case "prompt":
                token_ids = await self._encode(message.prompt, add_special=True)
            case "chat":
                size = self._check_chat(message.chat)
                text = await self._beside(size, self._render, message.chat)
                token_ids = await self._encode(text, add_special=False)
            case "token_ids":
                if len(message.token_ids.ids) >= self.model.context_length:
                    raise self._too_long(len(message.token_ids.ids))
                token_ids = list(message.token_ids.ids)
                self._check_ids("token_ids", token_ids)
            case _:
                raise InvalidRequest("the request has no input; set prompt, chat or token_ids")
        if not token_ids:
            raise InvalidRequest("the prompt is empty; send at least one token of input")
        return token_ids

    async def _beside(self, size: int, work: Callable[..., T], *args: object) -> T:
        """work(*args): in a thread where it takes long, which `size`, the characters of its text, tells.

        Raises:
            Overloaded: too much text waits for those threads already.
        """
        if size < LONG_TEXT:
            return work(*args)
        if self._waiting_text + size > MAX_WAITING_TEXT:
            raise Overloaded(
                f"{self._waiting_text} bytes of long prompts wait to be tokenised; retry", retry_after_s=1.0
            )
        self._waiting_text += size
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
        finally:
            self._waiting_text -= size

    def _check_chat(self, chat: pb.Chat) -> int:
        """Its size in bytes."""
        number, context = len(chat.messages), self.model.context_length
        if not number:
            raise InvalidRequest("the chat has no messages; send at least one")
        if number > context:
            raise PromptTooLong(
                f"the chat has {number} messages, each at least one token; the model's context is {context} "
                "tokens: shorten the chat"
            )
        size = chat.ByteSize()
        self._check_text(size - number * MESSAGE_FRAME_BYTES)
        return size

    def _render(self, chat: pb.Chat) -> str:
        return self.model.chat_template.render(
            [{"role": message.role, "content": message.content} for message in chat.messages]
        )

    async def _encode(self, text: str, add_special: bool) -> list[int]:
        if not text:
            raise InvalidRequest("the prompt is empty; send at least one character")
        if len(text) >= LONG_TEXT:
            self._check_text(len(text.encode(errors="replace")))
        return await self._beside(len(text), self.model.tokenizer.encode, text, add_special)

    def _check_text(self, size: int) -> None:
        if size > self._max_text:
            context, longest = self.model.context_length, self.model.tokenizer.longest_token
            raise PromptTooLong(
                f"the prompt has at least {size} bytes of text; the model's context is {context} tokens, "
                f"each at most {longest} bytes, {self._max_text} together: shorten the prompt"
            )

    def _fit(self, sampling: pb.Sampling, num_prompt_tokens: int) -> None:
        """Cuts max_tokens to what the context leaves."""
        room = self.model.context_length - num_prompt_tokens
        if room < 1:
            raise self._too_long(num_prompt_tokens)
        if sampling.min_tokens > room:
            raise PromptTooLong(
                f"the prompt of {num_prompt_tokens} tokens leaves room for {room}; sampling.min_tokens is "
                f"{sampling.min_tokens}; shorten the prompt or lower min_tokens"
            )
        sampling.max_tokens = min(sampling.max_tokens, room)

    def _too_long(self, num_tokens: int) -> PromptTooLong:
        context = self.model.context_length
        return PromptTooLong(
            f"the prompt has {num_tokens} tokens; the model's context is {context}, one of them for the "
            f"completion: shorten the prompt to {context - 1} tokens"
        )

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        if token_ids and max(token_ids) >= self.model.vocab_size:
            raise InvalidRequest(
                f"{name} has id {max(token_ids)}; the model's vocabulary ends at {self.model.vocab_size - 1}"
            )


class TextStream:
    """One completion's text. Its pieces do not depend on how the tokens were grouped."""

    __slots__ = ("_count", "_detokenizer", "_matcher", "_min_tokens")

    def __init__(self, detokenizer: IncrementalDetokenizer, stop: Sequence[str], min_tokens: int) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop) if stop else None
        self._min_tokens = min_tokens
        self._count = 0

    def push(self, token_ids: Sequence[int]) -> tuple[str, int, bool]:
        """(text, how many of the tokens are part of the completion, whether a stop string was found). A stop
        string counts only from token min_tokens on; the token that completes it is the last one."""
        if self._matcher is None:
            return self._detokenizer.push(token_ids), len(token_ids), False
        text = ""
        for used, token_id in enumerate(token_ids, start=1):
            self._count += 1
            piece = self._detokenizer.push((token_id,))
            if self._count < self._min_tokens:
                text += piece
                continue
            passed, stopped = self._matcher.feed(piece)
            text += passed
            if stopped:
                return text, used, True
        return text, len(token_ids), False

    def finish(self) -> str:
        """What was held back; no token follows."""
        rest = self._detokenizer.flush()
        if self._matcher is None:
            return rest
        passed, stopped = self._matcher.feed(rest)
        return passed if stopped else passed + self._matcher.flush()
