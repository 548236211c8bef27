"""From a Submit to a sequence, and from a sampled token to the message that carries it.

What prefill and decode roles share about requests: validation, the rules of when a sequence is finished, and
the outputs. Knows no scheduler, no blocks and no hand-off.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..proto import inference_pb2, worker_pb2
from ..proto.errors import DiphaseError, InvalidRequest, PromptTooLong
from ..proto.ids import HandoffKey, check_request_id
from ..proto.sampling import sampling_from_proto
from ..proto.slo import Slo, slo_from_proto
from .base import ModelLimits, SampledToken
from .sequence import Sequence

NOT_FINISHED = inference_pb2.FINISH_REASON_UNSPECIFIED
MAX_ELAPSED_S = 86_400.0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a step did to a sequence that sampled."""

    sequence: Sequence
    token: SampledToken
    """Already the last of `sequence.token_ids`."""
    finish_reason: inference_pb2.FinishReason
    """FINISH_REASON_UNSPECIFIED while the sequence goes on."""


def key_of(message: worker_pb2.Submit | worker_pb2.SequenceOutput | worker_pb2.Cancel) -> HandoffKey:
    return HandoffKey(message.request_id, message.attempt)


def sequence_from_submit(submit: worker_pb2.Submit, limits: ModelLimits, now: float) -> Sequence:
    """A sequence with nothing computed. `now` is this worker's clock, at which the submit arrived.

    Raises:
        InvalidRequest: the ids, the sampling parameters or the objectives can never work.
        PromptTooLong: prompt and earlier tokens leave no room for another in the model's context.
    """
    check_request_id(submit.request_id)
    params = sampling_from_proto(submit.sampling)
    slo = slo_from_proto(submit.slo, Slo())
    token_ids = [*submit.prompt_token_ids, *submit.emitted_token_ids]
    if not submit.prompt_token_ids:
        raise InvalidRequest("the prompt has no tokens; send at least one")
    if max(token_ids) >= limits.vocab_size:
        raise InvalidRequest(
            f"token id {max(token_ids)} is not in the vocabulary; ids are below {limits.vocab_size}"
        )
    if len(token_ids) >= limits.context_length:
        raise PromptTooLong(
            f"{len(token_ids)} tokens leave no room to generate in a context of {limits.context_length}; "
            "shorten the prompt"
        )
    if len(submit.emitted_token_ids) >= params.max_tokens:
        raise InvalidRequest(f"all {params.max_tokens} tokens of max_tokens have been emitted already")
    if not 0.0 <= submit.elapsed_s <= MAX_ELAPSED_S:
        raise InvalidRequest(f"elapsed_s = {submit.elapsed_s} is out of range; use 0 to {MAX_ELAPSED_S:.0f}")
    return Sequence(
        key=key_of(submit),
        gateway_id=submit.gateway_id,
        token_ids=token_ids,
        num_prompt_tokens=len(submit.prompt_token_ids),
        params=params,
        slo=slo,
        arrived_at=now,
        waited_s=submit.elapsed_s,
    )


def finish_reason(sequence: Sequence, limits: ModelLimits) -> inference_pb2.FinishReason:
    """Why the sequence ends with its last token, which was generated; unspecified when it goes on."""
    params = sequence.params
    token_id, index = sequence.token_ids[-1], sequence.num_generated - 1
    if index >= params.min_tokens:
        ends_text = token_id in limits.eos_token_ids and not params.ignore_eos
        if ends_text or token_id in params.stop_token_ids:
            return inference_pb2.FINISH_REASON_STOP
    if sequence.num_generated >= params.max_tokens or sequence.num_tokens >= limits.context_length:
        return inference_pb2.FINISH_REASON_LENGTH
    return NOT_FINISHED


def append_sampled(sequence: Sequence, token: SampledToken, limits: ModelLimits) -> Outcome:
    """Makes the sampled token the sequence's last one."""
    sequence.token_ids.append(token.token_id)
    return Outcome(sequence=sequence, token=token, finish_reason=finish_reason(sequence, limits))


def token_output(outcome: Outcome) -> worker_pb2.SequenceOutput:
    """The message for one sampled token, with the terminal event if it is the last."""
    sequence = outcome.sequence
    output = worker_pb2.SequenceOutput(
        request_id=sequence.key.request_id,
        attempt=sequence.key.attempt,
        index=sequence.num_generated - 1,
        token_ids=[outcome.token.token_id],
    )
    if sequence.params.logprobs is not None:
        output.logprobs.append(logprobs_message(outcome.token))
    if outcome.finish_reason != NOT_FINISHED:
        output.terminal.finish_reason = outcome.finish_reason
    return output


def logprobs_message(token: SampledToken) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        logprob=token.logprob,
        top=[inference_pb2.TokenLogprob(token_id=i, logprob=value) for i, value in token.top],
    )


def failed_output(key: HandoffKey, index: int, error: DiphaseError) -> worker_pb2.SequenceOutput:
    """The terminal event of an attempt that failed before token `index`."""
    return worker_pb2.SequenceOutput(
        request_id=key.request_id,
        attempt=key.attempt,
        index=index,
        terminal=worker_pb2.Terminal(error=wire_error(error)),
    )


def cancelled_output(key: HandoffKey, index: int) -> worker_pb2.SequenceOutput:
    """The terminal event of an attempt that was cancelled before token `index`."""
    return worker_pb2.SequenceOutput(
        request_id=key.request_id,
        attempt=key.attempt,
        index=index,
        terminal=worker_pb2.Terminal(cancelled=True),
    )


def wire_error(error: DiphaseError) -> worker_pb2.WireError:
    return worker_pb2.WireError(code=error.code, message=error.message, retryable=error.retryable)
