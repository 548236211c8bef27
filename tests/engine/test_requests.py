"""Submits become sequences or clear errors, and sequences end when they should."""

from __future__ import annotations

import pytest
from diphase.engine.base import ModelLimits, SampledToken
from diphase.engine.requests import append_sampled, failed_output, sequence_from_submit, token_output
from diphase.engine.sequence import Sequence
from diphase.proto import worker_pb2 as pb
from diphase.proto.errors import DiphaseError, InvalidRequest, Overloaded, PromptTooLong
from diphase.proto.ids import HandoffKey
from diphase.proto.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    FinishReason,
)
from diphase.proto.slo import Priority, Slo

from .sequences import make_submit

LIMITS = ModelLimits(name="m", context_length=20, vocab_size=100, eos_token_ids=(2, 3))


def test_a_submit_becomes_a_sequence() -> None:
    slo = Slo(ttft_ms=500.0, priority=Priority.INTERACTIVE)
    submit = make_submit("r", [5, 6], attempt=3, emitted=[7], slo=slo, max_tokens=9)
    submit.elapsed_s = 0.2
    sequence = sequence_from_submit(submit, LIMITS, 100.0)
    assert sequence.key == HandoffKey("r", 3)
    assert sequence.token_ids == [5, 6, 7]
    assert (sequence.num_prompt_tokens, sequence.num_generated) == (2, 1)
    assert sequence.params.max_tokens == 9
    assert sequence.slo == slo
    assert (sequence.arrived_at, sequence.waited_s) == (100.0, 0.2)


@pytest.mark.parametrize(
    ("submit", "error", "says"),
    [
        (make_submit("r", []), InvalidRequest, "no tokens"),
        (make_submit("", [5]), InvalidRequest, "request_id"),
        (make_submit("r", [100]), InvalidRequest, "vocabulary"),
        (make_submit("r", [5] * 20), PromptTooLong, "20 tokens"),
        (make_submit("r", [5] * 15, emitted=[5] * 5, max_tokens=9), PromptTooLong, "20 tokens"),
        (make_submit("r", [5], emitted=[5] * 3, max_tokens=3), InvalidRequest, "max_tokens"),
        (pb.Submit(request_id="r", prompt_token_ids=[5], elapsed_s=-1.0), InvalidRequest, "elapsed_s"),
    ],
)
def test_what_can_never_work_is_refused(submit: pb.Submit, error: type[DiphaseError], says: str) -> None:
    with pytest.raises(error, match=says):
        sequence_from_submit(submit, LIMITS, 0.0)


def generated(token_ids: list[int], **sampling: object) -> tuple[Sequence, list[FinishReason]]:
    """The sequence after these tokens, and the finish reason after each of them."""
    values = {"max_tokens": 50, "ignore_eos": False, **sampling}
    sequence = sequence_from_submit(make_submit("r", [5] * 4, **values), LIMITS, 0.0)  # type: ignore[arg-type]
    reasons = [
        append_sampled(sequence, SampledToken(token_id=token_id), LIMITS).finish_reason
        for token_id in token_ids
    ]
    return sequence, reasons


GOES_ON, STOP, LENGTH = FINISH_REASON_UNSPECIFIED, FINISH_REASON_STOP, FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    ("token_ids", "sampling", "reasons"),
    [
        ([9, 3], {}, [GOES_ON, STOP]),
        ([9, 3], {"ignore_eos": True}, [GOES_ON, GOES_ON]),
        ([9, 3], {"ignore_eos": True, "stop_token_ids": (3,)}, [GOES_ON, STOP]),
        ([9, 8], {"stop_token_ids": (8,)}, [GOES_ON, STOP]),
        ([9, 8], {"max_tokens": 2}, [GOES_ON, LENGTH]),
        ([9, 2], {"max_tokens": 2}, [GOES_ON, STOP]),
        ([8, 8, 8], {"stop_token_ids": (8,), "min_tokens": 2}, [GOES_ON, GOES_ON, STOP]),
        ([9] * 16, {}, [GOES_ON] * 15 + [LENGTH]),  # the context of 20
    ],
)
def test_a_sequence_ends_for_the_first_reason_that_holds(
    token_ids: list[int], sampling: dict[str, object], reasons: list[FinishReason]
) -> None:
    assert generated(token_ids, **sampling)[1] == reasons


def test_an_output_carries_index_token_and_log_probabilities_that_were_asked_for() -> None:
    sequence, _ = generated([9], logprobs=2)
    token = SampledToken(token_id=8, logprob=-0.25, top=[(8, -0.25), (7, -1.5)])
    output = token_output(append_sampled(sequence, token, LIMITS))
    assert (output.index, list(output.token_ids)) == (1, [8])
    assert output.logprobs[0].logprob == -0.25
    assert [(t.token_id, t.logprob) for t in output.logprobs[0].top] == [(8, -0.25), (7, -1.5)]
    assert not output.HasField("terminal")


def test_a_failure_says_code_sentence_and_whether_to_retry() -> None:
    output = failed_output(HandoffKey("r", 2), 5, Overloaded("too much"))
    assert (output.attempt, output.index) == (2, 5)
    error = output.terminal.error
    assert (error.code, error.message, error.retryable) == ("overloaded", "too much", True)
