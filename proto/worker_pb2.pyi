from diphase.proto import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GatewayFrame(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[GatewayMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[GatewayMessage, _Mapping]]] = ...) -> None: ...

class GatewayMessage(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "resume", "acknowledge", "ping", "prefix_snapshot", "inspect")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    INSPECT_FIELD_NUMBER: _ClassVar[int]
    hello: GatewayHello
    submit: Submit
    cancel: Cancel
    resume: Resume
    acknowledge: Acknowledge
    ping: Ping
    prefix_snapshot: PrefixSnapshotRequest
    inspect: Inspect
    def __init__(self, hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., acknowledge: _Optional[_Union[Acknowledge, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., prefix_snapshot: _Optional[_Union[PrefixSnapshotRequest, _Mapping]] = ..., inspect: _Optional[_Union[Inspect, _Mapping]] = ...) -> None: ...

class GatewayHello(_message.Message):
    __slots__ = ("gateway_id", "incarnation", "cluster_token", "protocol_version")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    incarnation: str
    cluster_token: str
    protocol_version: int
    def __init__(self, gateway_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., cluster_token: _Optional[str] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class PeerAddress(_message.Message):
    __slots__ = ("worker_id", "incarnation", "address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    address: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_id", "attempt", "gateway_id", "prompt_token_ids", "emitted_token_ids", "sampling", "slo", "elapsed_s", "decode", "client_request_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    gateway_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    emitted_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _inference_pb2.Sampling
    slo: _inference_pb2.Slo
    elapsed_s: float
    decode: PeerAddress
    client_request_id: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., gateway_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., emitted_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., slo: _Optional[_Union[_inference_pb2.Slo, _Mapping]] = ..., elapsed_s: _Optional[float] = ..., decode: _Optional[_Union[PeerAddress, _Mapping]] = ..., client_request_id: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("request_id", "client_request_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    client_request_id: str
    def __init__(self, request_id: _Optional[str] = ..., client_request_id: _Optional[str] = ...) -> None: ...

class Acknowledge(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("sent_at",)
    SENT_AT_FIELD_NUMBER: _ClassVar[int]
    sent_at: float
    def __init__(self, sent_at: _Optional[float] = ...) -> None: ...

class PrefixSnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerFrame(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[WorkerMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[WorkerMessage, _Mapping]]] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "step", "heartbeat", "pong", "prefix_delta", "prefix_snapshot", "resumed", "moved", "inspected")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    PREFIX_DELTA_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    INSPECTED_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    step: StepOutput
    heartbeat: Heartbeat
    pong: Pong
    prefix_delta: PrefixDelta
    prefix_snapshot: PrefixSnapshot
    resumed: Resumed
    moved: Moved
    inspected: Inspected
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., step: _Optional[_Union[StepOutput, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., prefix_delta: _Optional[_Union[PrefixDelta, _Mapping]] = ..., prefix_snapshot: _Optional[_Union[PrefixSnapshot, _Mapping]] = ..., resumed: _Optional[_Union[Resumed, _Mapping]] = ..., moved: _Optional[_Union[Moved, _Mapping]] = ..., inspected: _Optional[_Union[Inspected, _Mapping]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "model", "block_size", "num_blocks", "context_length", "max_running", "chunk_budget", "layout_hash", "protocol_version", "transports", "kv_sharding", "package_version")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BUDGET_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    KV_SHARDING_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    role: str
    model: str
    block_size: int
    num_blocks: int
    context_length: int
    max_running: int
    chunk_budget: int
    layout_hash: str
    protocol_version: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    kv_sharding: str
    package_version: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[str] = ..., model: _Optional[str] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., context_length: _Optional[int] = ..., max_running: _Optional[int] = ..., chunk_budget: _Optional[int] = ..., layout_hash: _Optional[str] = ..., protocol_version: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., kv_sharding: _Optional[str] = ..., package_version: _Optional[str] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("outputs", "sample", "load")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[SequenceOutput]
    sample: StepSample
    load: Load
    def __init__(self, outputs: _Optional[_Iterable[_Union[SequenceOutput, _Mapping]]] = ..., sample: _Optional[_Union[StepSample, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class SequenceOutput(_message.Message):
    __slots__ = ("request_id", "attempt", "index", "token_ids", "logprobs", "terminal", "prefill", "decode")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TERMINAL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    terminal: Terminal
    prefill: PrefillTimes
    decode: DecodeTimes
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ..., terminal: _Optional[_Union[Terminal, _Mapping]] = ..., prefill: _Optional[_Union[PrefillTimes, _Mapping]] = ..., decode: _Optional[_Union[DecodeTimes, _Mapping]] = ...) -> None: ...

class Terminal(_message.Message):
    __slots__ = ("finish_reason", "cancelled", "error")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    finish_reason: _inference_pb2.FinishReason
    cancelled: bool
    error: WireError
    def __init__(self, finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., cancelled: _Optional[bool] = ..., error: _Optional[_Union[WireError, _Mapping]] = ...) -> None: ...

class WireError(_message.Message):
    __slots__ = ("code", "message", "retryable")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retryable: bool
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retryable: _Optional[bool] = ...) -> None: ...

class PrefillTimes(_message.Message):
    __slots__ = ("received_at", "scheduled_at", "token_at", "cached_tokens")
    RECEIVED_AT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULED_AT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_AT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    received_at: float
    scheduled_at: float
    token_at: float
    cached_tokens: int
    def __init__(self, received_at: _Optional[float] = ..., scheduled_at: _Optional[float] = ..., token_at: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class DecodeTimes(_message.Message):
    __slots__ = ("verified_at", "scheduled_at", "token_at", "handoff_bytes", "handoff_segments")
    VERIFIED_AT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULED_AT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_AT_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_BYTES_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    verified_at: float
    scheduled_at: float
    token_at: float
    handoff_bytes: int
    handoff_segments: int
    def __init__(self, verified_at: _Optional[float] = ..., scheduled_at: _Optional[float] = ..., token_at: _Optional[float] = ..., handoff_bytes: _Optional[int] = ..., handoff_segments: _Optional[int] = ...) -> None: ...

class StepSample(_message.Message):
    __slots__ = ("prefill_tokens", "prefill_context", "decode_batch", "decode_context", "duration_s", "ended_at")
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DECODE_BATCH_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    prefill_tokens: int
    prefill_context: int
    decode_batch: int
    decode_context: int
    duration_s: float
    ended_at: float
    def __init__(self, prefill_tokens: _Optional[int] = ..., prefill_context: _Optional[int] = ..., decode_batch: _Optional[int] = ..., decode_context: _Optional[int] = ..., duration_s: _Optional[float] = ..., ended_at: _Optional[float] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("waiting_requests", "waiting_tokens", "running", "running_context", "blocks_total", "blocks_free", "blocks_cached", "blocks_running", "blocks_reserved", "blocks_held", "blocks_quarantined", "handoffs", "preemptions", "draining", "drained")
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_RESERVED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_HELD_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    waiting_requests: int
    waiting_tokens: int
    running: int
    running_context: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_running: int
    blocks_reserved: int
    blocks_held: int
    blocks_quarantined: int
    handoffs: int
    preemptions: int
    draining: bool
    drained: bool
    def __init__(self, waiting_requests: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., running: _Optional[int] = ..., running_context: _Optional[int] = ..., blocks_total: _Optional[int] = ..., blocks_free: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., blocks_running: _Optional[int] = ..., blocks_reserved: _Optional[int] = ..., blocks_held: _Optional[int] = ..., blocks_quarantined: _Optional[int] = ..., handoffs: _Optional[int] = ..., preemptions: _Optional[int] = ..., draining: _Optional[bool] = ..., drained: _Optional[bool] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sequence", "at", "step_age_s", "step_predicted_s", "load")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    STEP_PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    at: float
    step_age_s: float
    step_predicted_s: float
    load: Load
    def __init__(self, sequence: _Optional[int] = ..., at: _Optional[float] = ..., step_age_s: _Optional[float] = ..., step_predicted_s: _Optional[float] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("sent_at", "at")
    SENT_AT_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    sent_at: float
    at: float
    def __init__(self, sent_at: _Optional[float] = ..., at: _Optional[float] = ...) -> None: ...

class PrefixDelta(_message.Message):
    __slots__ = ("sequence", "stored", "evicted")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    stored: _containers.RepeatedScalarFieldContainer[bytes]
    evicted: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, sequence: _Optional[int] = ..., stored: _Optional[_Iterable[bytes]] = ..., evicted: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PrefixSnapshot(_message.Message):
    __slots__ = ("sequence", "hashes")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, sequence: _Optional[int] = ..., hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("request_id", "known", "submit", "token_ids", "logprobs", "terminal", "client_request_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TERMINAL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    known: bool
    submit: Submit
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    terminal: Terminal
    client_request_id: str
    def __init__(self, request_id: _Optional[str] = ..., known: _Optional[bool] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ..., terminal: _Optional[_Union[Terminal, _Mapping]] = ..., client_request_id: _Optional[str] = ...) -> None: ...

class Moved(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Inspect(_message.Message):
    __slots__ = ("id", "request_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    id: int
    request_id: str
    def __init__(self, id: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class Inspected(_message.Message):
    __slots__ = ("id", "transfers", "events")
    ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    id: int
    transfers: _containers.RepeatedCompositeFieldContainer[TransferFigures]
    events: _containers.RepeatedCompositeFieldContainer[TraceEvent]
    def __init__(self, id: _Optional[int] = ..., transfers: _Optional[_Iterable[_Union[TransferFigures, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[TraceEvent, _Mapping]]] = ...) -> None: ...

class TransferFigures(_message.Message):
    __slots__ = ("transport", "peer", "outgoing", "transfers", "bytes", "segments", "queued_s", "wire_s", "verify_s", "failures", "fences", "quarantined_blocks", "wire_bytes")
    class FailuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    OUTGOING_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_S_FIELD_NUMBER: _ClassVar[int]
    VERIFY_S_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    FENCES_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    transport: str
    peer: str
    outgoing: bool
    transfers: int
    bytes: int
    segments: int
    queued_s: float
    wire_s: float
    verify_s: float
    failures: _containers.ScalarMap[str, int]
    fences: int
    quarantined_blocks: int
    wire_bytes: int
    def __init__(self, transport: _Optional[str] = ..., peer: _Optional[str] = ..., outgoing: _Optional[bool] = ..., transfers: _Optional[int] = ..., bytes: _Optional[int] = ..., segments: _Optional[int] = ..., queued_s: _Optional[float] = ..., wire_s: _Optional[float] = ..., verify_s: _Optional[float] = ..., failures: _Optional[_Mapping[str, int]] = ..., fences: _Optional[int] = ..., quarantined_blocks: _Optional[int] = ..., wire_bytes: _Optional[int] = ...) -> None: ...

class TraceEvent(_message.Message):
    __slots__ = ("begin_s", "end_s", "where", "track", "name", "detail")
    BEGIN_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    TRACK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    begin_s: float
    end_s: float
    where: str
    track: str
    name: str
    detail: str
    def __init__(self, begin_s: _Optional[float] = ..., end_s: _Optional[float] = ..., where: _Optional[str] = ..., track: _Optional[str] = ..., name: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...
