"""TextProcessor and TextStream: what clients may send, and what they get back."""

from __future__ import annotations

import random
from typing import Any

import pytest
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import InvalidRequest, NotFound, PromptTooLong
from diphase.proto.sampling import SamplingParams, sampling_to_proto
from diphase.proto.slo import Priority, Slo
from diphase.router.text import ENCODE_IN_THREAD_CHARS, PreparedRequest, TextProcessor, TextStream

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
    model_text = "word " * (ENCODE_IN_THREAD_CHARS // 5 + 1)
    with pytest.raises(PromptTooLong):
        await prepare(prompt=model_text * 4)


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
