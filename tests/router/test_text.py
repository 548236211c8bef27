"""TextProcessor and TextStream: what clients may send, and what they get back."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from diphase.checkpoints.chat_template import ChatTemplate
from diphase.checkpoints.tokenizer import LONG_TEXT
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import InvalidRequest, NotFound, Overloaded, PromptTooLong
from diphase.proto.sampling import SamplingParams, sampling_to_proto
from diphase.proto.slo import Priority, Slo
from diphase.router import text as text_module
from diphase.router.text import PreparedRequest, TextProcessor, TextStream

from .fake_workers import LoopClock
from .fakes import served_model

MODEL = served_model()
CONTEXT = MODEL.context_length


def processor() -> TextProcessor:
    return TextProcessor(MODEL, Slo(ttft_ms=1234.0), LoopClock(), random.Random(1))


async def prepare(**fields: object) -> PreparedRequest:
    return await processor().prepare(pb.GenerateRequest(**fields), 0.0)  # type: ignore[arg-type]


async def test_a_prompt_is_tokenised() -> None:
    request = await prepare(prompt="héllo", request_id="r.1")
    assert MODEL.tokenizer.decode(request.prompt_token_ids) == "héllo"
    assert request.client_request_id == "r.1"
    assert request.sampling.max_tokens == 256
    assert request.slo == Slo(ttft_ms=1234.0)
    assert request.tokenised_at >= 0.0


async def test_chat_goes_through_the_models_template() -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")])
    request = await prepare(chat=chat)
    assert MODEL.tokenizer.decode(request.prompt_token_ids) == "user: Hi\nassistant: "


async def test_token_ids_are_taken_as_they_are() -> None:
    assert (await prepare(token_ids=pb.TokenIds(ids=[5, 6, 511]))).prompt_token_ids == [5, 6, 511]


async def test_ids_and_seeds_are_drawn_and_travel_complete() -> None:
    text = processor()
    first = await text.prepare(pb.GenerateRequest(prompt="x"), 0.0)
    second = await text.prepare(pb.GenerateRequest(prompt="x"), 0.0)
    assert first.request_id != second.request_id
    assert first.sampling.seed != second.sampling.seed
    assert first.sampling.HasField("temperature")
    given = await prepare(prompt="x", sampling=pb.Sampling(seed=0))
    assert given.sampling.seed == 0


async def test_max_tokens_is_cut_to_what_the_context_leaves() -> None:
    request = await prepare(
        token_ids=pb.TokenIds(ids=[1] * (CONTEXT - 3)), sampling=pb.Sampling(max_tokens=50)
    )
    assert request.sampling.max_tokens == 3


async def test_a_long_text_is_tokenised_too() -> None:
    long = "word " * (LONG_TEXT // 5 + 1)
    assert (await prepare(prompt=long)).prompt_token_ids == ids_of(long)
    with pytest.raises(PromptTooLong, match=f"the prompt has {4 * len(long)} tokens"):
        await prepare(prompt=long * 4)


async def test_special_tokens_that_are_spelled_out_fit_as_the_few_tokens_that_they_are() -> None:
    count = CONTEXT - 10
    assert len((await prepare(prompt="<|eos|>" * count)).prompt_token_ids) == count


class WatchedTemplate(ChatTemplate):
    """The template that says on which threads it rendered."""

    def __init__(self) -> None:
        super().__init__("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}", model=MODEL.name)
        self.threads: list[int] = []

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        self.threads.append(threading.get_ident())
        return super().render(messages, add_generation_prompt)


def watched() -> tuple[TextProcessor, WatchedTemplate]:
    template = WatchedTemplate()
    model = replace(MODEL, chat_template=template)
    return TextProcessor(model, Slo(), LoopClock(), random.Random(1)), template


def chat_of(number: int, content: str = "") -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="u", content=content)] * number))


async def test_only_a_small_chat_is_rendered_on_the_event_loop() -> None:
    text, template = watched()
    here = threading.get_ident()
    await text.prepare(chat_of(20), 0.0)
    assert template.threads == [here]
    for large in (chat_of(3000), chat_of(1, "x" * LONG_TEXT)):
        await text.prepare(large, 0.0)
        assert template.threads.pop() != here


@pytest.mark.parametrize(
    ("chat", "sentence"),
    [
        (chat_of(CONTEXT + 1), f"has {CONTEXT + 1} messages.*model's context is {CONTEXT} tokens: shorten"),
        (
            chat_of(2, "x" * 40_000),
            f"at least 79992 bytes of text; .*{CONTEXT} tokens, each at most 7 bytes, 57344",
        ),
    ],
)
async def test_a_chat_that_cannot_fit_is_refused_before_it_is_rendered(
    chat: pb.GenerateRequest, sentence: str
) -> None:
    text, template = watched()
    with pytest.raises(PromptTooLong, match=sentence):
        await text.prepare(chat, 0.0)
    assert template.threads == []


async def test_every_chat_that_may_fit_is_let_through() -> None:
    """The bounds on sizes refuse nothing that the count of tokens would accept."""
    text, _ = watched()
    assert len((await text.prepare(chat_of(CONTEXT - 1), 0.0)).prompt_token_ids) == CONTEXT - 1
    long = chat_of(1, "<|eos|>" * (CONTEXT - 2))
    text.check_size(long.ByteSize())
    assert len((await text.prepare(long, 0.0)).prompt_token_ids) == CONTEXT - 1


async def test_long_prompts_beyond_what_may_wait_are_refused_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MAX_WAITING_TEXT", LONG_TEXT)
    text = processor()
    with pytest.raises(Overloaded, match="retry") as caught:
        await text.prepare(pb.GenerateRequest(prompt="x" * (LONG_TEXT + 1)), 0.0)
    assert caught.value.retry_after_s
    for _ in range(2):  # what was tokenised waits no more
        await text.prepare(pb.GenerateRequest(prompt="x" * LONG_TEXT), 0.0)


async def test_what_is_remembered_of_samplings_stays_small() -> None:
    """Fields that are not known survive parsing: a client could have any number of bytes kept."""
    text = processor()
    unknown = pb.Sampling.FromString(
        pb.Sampling(max_tokens=1).SerializeToString() + b"\xfa\x3f\xc0\x84\x3d" + bytes(1_000_000)
    )
    assert unknown.ByteSize() > 1_000_000
    await text.prepare(pb.GenerateRequest(prompt="x", sampling=unknown), 0.0)
    await text.prepare(pb.GenerateRequest(prompt="x", sampling=pb.Sampling(max_tokens=2)), 0.0)
    assert [len(key) for key in text._checked_samplings] == [2]


async def test_objectives_and_priority_are_the_requests_own() -> None:
    slo = pb.Slo(tpot_ms=7, priority=pb.PRIORITY_BATCH)
    assert (await prepare(prompt="x", slo=slo)).slo == Slo(
        ttft_ms=1234.0, tpot_ms=7.0, priority=Priority.BATCH
    )


@pytest.mark.parametrize(
    ("fields", "error", "hint"),
    [
        ({}, InvalidRequest, "set prompt, chat or token_ids"),
        ({"prompt": ""}, InvalidRequest, "empty"),
        ({"token_ids": pb.TokenIds()}, InvalidRequest, "empty"),
        ({"chat": pb.Chat()}, InvalidRequest, "no messages"),
        ({"token_ids": pb.TokenIds(ids=[512])}, InvalidRequest, "ends at 511"),
        (
            {"token_ids": pb.TokenIds(ids=[1] * CONTEXT)},
            PromptTooLong,
            f"shorten the prompt to {CONTEXT - 1}",
        ),
        ({"token_ids": pb.TokenIds(ids=[512] * CONTEXT)}, PromptTooLong, "tokens"),  # counted first
        ({"prompt": "x" * 5_000_000}, PromptTooLong, "shorten the prompt"),
        ({"prompt": "x", "model": "other"}, NotFound, "this cluster serves model 'dummy:tiny'"),
        ({"prompt": "x", "request_id": "a b"}, InvalidRequest, "request_id"),
        ({"prompt": "x", "request_id": "a" * 129}, InvalidRequest, "request_id"),
        ({"prompt": "x", "sampling": pb.Sampling(max_tokens=0)}, InvalidRequest, "sampling.max_tokens"),
        ({"prompt": "x", "sampling": pb.Sampling(min_tokens=9, max_tokens=5)}, InvalidRequest, "min_tokens"),
        ({"prompt": "x", "sampling": pb.Sampling(temperature=-1)}, InvalidRequest, "sampling.temperature"),
        ({"prompt": "x", "sampling": pb.Sampling(temperature=float("nan"))}, InvalidRequest, "temperature"),
        ({"prompt": "x", "sampling": pb.Sampling(top_p=0)}, InvalidRequest, "sampling.top_p"),
        ({"prompt": "x", "sampling": pb.Sampling(min_p=1.5)}, InvalidRequest, "sampling.min_p"),
        ({"prompt": "x", "sampling": pb.Sampling(stop=[""])}, InvalidRequest, "sampling.stop"),
        ({"prompt": "x", "sampling": pb.Sampling(stop=["s"] * 17)}, InvalidRequest, "at most 16"),
        ({"prompt": "x", "sampling": pb.Sampling(stop_token_ids=[512])}, InvalidRequest, "stop_token_ids"),
        ({"prompt": "x", "sampling": pb.Sampling(logprobs=21)}, InvalidRequest, "sampling.logprobs"),
        ({"prompt": "x", "slo": pb.Slo(ttft_ms=-5)}, InvalidRequest, "slo.ttft_ms"),
        ({"prompt": "x", "slo": pb.Slo(tpot_ms=float("inf"))}, InvalidRequest, "slo.tpot_ms"),
        ({"prompt": "x", "slo": pb.Slo(priority=9)}, InvalidRequest, "slo.priority"),  # type: ignore[arg-type]
    ],
)
async def test_what_can_never_work_is_refused_with_a_sentence(
    fields: dict[str, object], error: type[InvalidRequest], hint: str
) -> None:
    with pytest.raises(error) as caught:
        await prepare(**fields)
    assert hint in caught.value.message


async def test_min_tokens_beyond_the_context_is_refused() -> None:
    with pytest.raises(PromptTooLong, match="lower min_tokens"):
        await prepare(
            token_ids=pb.TokenIds(ids=[1] * (CONTEXT - 3)), sampling=pb.Sampling(min_tokens=4, max_tokens=9)
        )


def text_stream(**params: Any) -> TextStream:
    return processor().stream(sampling_to_proto(SamplingParams(**params)))


def ids_of(text: str) -> list[int]:
    return MODEL.tokenizer.encode(text, False)


def push_one_by_one(stream: TextStream, ids: list[int]) -> tuple[str, int, bool]:
    text = ""
    for count, token_id in enumerate(ids, start=1):
        piece, _, stopped = stream.push([token_id])
        text += piece
        if stopped:
            return text, count, True
    return text, len(ids), False


def test_text_comes_in_whole_characters() -> None:
    stream = text_stream()
    pieces = [stream.push([token_id])[0] for token_id in ids_of("aé€😀")]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    assert stream.finish() == ""


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    stream = text_stream()
    stream.push(ids_of("é")[:1])
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("grouped", [True, False])
def test_a_stop_string_ends_the_text_before_itself(grouped: bool) -> None:
    stream = text_stream(stop=("STOP", "zzz"))
    ids = ids_of("one STOP two")
    found = stream.push(ids) if grouped else push_one_by_one(stream, ids)
    assert found == ("one ", len("one STOP"), True)


def test_what_only_looked_like_a_stop_string_is_given_out_at_the_end() -> None:
    stream = text_stream(stop=("STOP",))
    assert stream.push(ids_of("one STO")) == ("one ", 7, False)
    assert stream.finish() == "STO"


def test_stop_strings_count_only_from_min_tokens_on() -> None:
    stream = text_stream(stop=("ab",), min_tokens=4)
    assert push_one_by_one(stream, ids_of("abcabz")) == ("abc", 5, True)
