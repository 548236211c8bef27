from diphase.proto import inference_pb2 as _inference_pb2
from diphase.proto import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HandoffFrame(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[HandoffMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[HandoffMessage, _Mapping]]] = ...) -> None: ...

class HandoffId(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class HandoffMessage(_message.Message):
    __slots__ = ("id", "hello", "reserve", "granted", "queued", "refused", "progress", "complete", "verified", "abort", "pushed", "consumed")
    ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    PUSHED_FIELD_NUMBER: _ClassVar[int]
    CONSUMED_FIELD_NUMBER: _ClassVar[int]
    id: HandoffId
    hello: PeerHello
    reserve: Reserve
    granted: Granted
    queued: Queued
    refused: Refused
    progress: Progress
    complete: Complete
    verified: Verified
    abort: Abort
    pushed: Pushed
    consumed: Consumed
    def __init__(self, id: _Optional[_Union[HandoffId, _Mapping]] = ..., hello: _Optional[_Union[PeerHello, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., granted: _Optional[_Union[Granted, _Mapping]] = ..., queued: _Optional[_Union[Queued, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., complete: _Optional[_Union[Complete, _Mapping]] = ..., verified: _Optional[_Union[Verified, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., pushed: _Optional[_Union[Pushed, _Mapping]] = ..., consumed: _Optional[_Union[Consumed, _Mapping]] = ...) -> None: ...

class PeerHello(_message.Message):
    __slots__ = ("worker_id", "incarnation", "cluster_token", "protocol_version", "layout_hash", "endpoints", "transport", "tensor_parallel", "pipeline_parallel", "staging", "codecs")
    class EndpointsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    STAGING_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    cluster_token: str
    protocol_version: int
    layout_hash: str
    endpoints: _containers.ScalarMap[str, bytes]
    transport: str
    tensor_parallel: int
    pipeline_parallel: int
    staging: StagingWindow
    codecs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., cluster_token: _Optional[str] = ..., protocol_version: _Optional[int] = ..., layout_hash: _Optional[str] = ..., endpoints: _Optional[_Mapping[str, bytes]] = ..., transport: _Optional[str] = ..., tensor_parallel: _Optional[int] = ..., pipeline_parallel: _Optional[int] = ..., staging: _Optional[_Union[StagingWindow, _Mapping]] = ..., codecs: _Optional[_Iterable[str]] = ...) -> None: ...

class StagingWindow(_message.Message):
    __slots__ = ("region", "offset", "size")
    REGION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    region: int
    offset: int
    size: int
    def __init__(self, region: _Optional[int] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("submit", "num_tokens", "block_hashes")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    submit: _worker_pb2.Submit
    num_tokens: int
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, submit: _Optional[_Union[_worker_pb2.Submit, _Mapping]] = ..., num_tokens: _Optional[int] = ..., block_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Granted(_message.Message):
    __slots__ = ("first_block", "block_ids", "ticket", "deadline_s")
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    first_block: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    ticket: int
    deadline_s: float
    def __init__(self, first_block: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., ticket: _Optional[int] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("lease_s",)
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    lease_s: float
    def __init__(self, lease_s: _Optional[float] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: _worker_pb2.WireError
    def __init__(self, error: _Optional[_Union[_worker_pb2.WireError, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("computed_tokens",)
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    computed_tokens: int
    def __init__(self, computed_tokens: _Optional[int] = ...) -> None: ...

class Complete(_message.Message):
    __slots__ = ("num_parts", "token_id", "logprobs", "token_at", "recompute")
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_AT_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_FIELD_NUMBER: _ClassVar[int]
    num_parts: int
    token_id: int
    logprobs: _inference_pb2.TokenLogprobs
    token_at: float
    recompute: bool
    def __init__(self, num_parts: _Optional[int] = ..., token_id: _Optional[int] = ..., logprobs: _Optional[_Union[_inference_pb2.TokenLogprobs, _Mapping]] = ..., token_at: _Optional[float] = ..., recompute: _Optional[bool] = ...) -> None: ...

class Verified(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Abort(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: _worker_pb2.WireError
    def __init__(self, error: _Optional[_Union[_worker_pb2.WireError, _Mapping]] = ...) -> None: ...

class Pushed(_message.Message):
    __slots__ = ("part", "first_block", "num_blocks", "first_layer", "num_layers", "digests", "staged")
    PART_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    part: int
    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int
    digests: _containers.RepeatedScalarFieldContainer[int]
    staged: Staged
    def __init__(self, part: _Optional[int] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., digests: _Optional[_Iterable[int]] = ..., staged: _Optional[_Union[Staged, _Mapping]] = ...) -> None: ...

class Staged(_message.Message):
    __slots__ = ("piece", "offset", "length", "codec")
    PIECE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    piece: int
    offset: int
    length: int
    codec: str
    def __init__(self, piece: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., codec: _Optional[str] = ...) -> None: ...

class Consumed(_message.Message):
    __slots__ = ("piece", "codec", "kv_bytes", "seconds")
    PIECE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    piece: int
    codec: str
    kv_bytes: int
    seconds: float
    def __init__(self, piece: _Optional[int] = ..., codec: _Optional[str] = ..., kv_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...
