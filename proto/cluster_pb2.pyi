from diphase.proto import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChangeRequest(_message.Message):
    __slots__ = ("scale", "restart", "timeout_s")
    SCALE_FIELD_NUMBER: _ClassVar[int]
    RESTART_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    scale: Scale
    restart: Restart
    timeout_s: float
    def __init__(self, scale: _Optional[_Union[Scale, _Mapping]] = ..., restart: _Optional[_Union[Restart, _Mapping]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class Scale(_message.Message):
    __slots__ = ("pool", "workers")
    POOL_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    pool: str
    workers: int
    def __init__(self, pool: _Optional[str] = ..., workers: _Optional[int] = ...) -> None: ...

class Restart(_message.Message):
    __slots__ = ("pool", "settings")
    POOL_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    pool: str
    settings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, pool: _Optional[str] = ..., settings: _Optional[_Iterable[str]] = ...) -> None: ...

class ChangeProgress(_message.Message):
    __slots__ = ("worker_id", "step")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    step: str
    def __init__(self, worker_id: _Optional[str] = ..., step: _Optional[str] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ("transfers",)
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    transfers: bool
    def __init__(self, transfers: _Optional[bool] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("model", "gateway_id", "workers", "queued_requests", "running_requests", "queued_tokens", "requests_by_slo", "metrics_address", "mismatches")
    class RequestsBySloEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_BY_SLO_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MISMATCHES_FIELD_NUMBER: _ClassVar[int]
    model: str
    gateway_id: str
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    queued_requests: int
    running_requests: int
    queued_tokens: int
    requests_by_slo: _containers.ScalarMap[str, int]
    metrics_address: str
    mismatches: _containers.RepeatedCompositeFieldContainer[Mismatch]
    def __init__(self, model: _Optional[str] = ..., gateway_id: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., queued_requests: _Optional[int] = ..., running_requests: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., requests_by_slo: _Optional[_Mapping[str, int]] = ..., metrics_address: _Optional[str] = ..., mismatches: _Optional[_Iterable[_Union[Mismatch, _Mapping]]] = ...) -> None: ...

class Mismatch(_message.Message):
    __slots__ = ("prefill", "decode", "reason")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    prefill: str
    decode: str
    reason: str
    def __init__(self, prefill: _Optional[str] = ..., decode: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "role", "state", "address", "incarnation", "load", "heartbeat_age_s", "metrics_address", "transfers", "layout_hash", "protocol_version", "kv_sharding", "package_version", "step_error", "step_bias", "predicted_steps")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    KV_SHARDING_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    STEP_ERROR_FIELD_NUMBER: _ClassVar[int]
    STEP_BIAS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_STEPS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    state: str
    address: str
    incarnation: str
    load: _worker_pb2.Load
    heartbeat_age_s: float
    metrics_address: str
    transfers: _containers.RepeatedCompositeFieldContainer[_worker_pb2.TransferFigures]
    layout_hash: str
    protocol_version: int
    kv_sharding: str
    package_version: str
    step_error: float
    step_bias: float
    predicted_steps: int
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[str] = ..., load: _Optional[_Union[_worker_pb2.Load, _Mapping]] = ..., heartbeat_age_s: _Optional[float] = ..., metrics_address: _Optional[str] = ..., transfers: _Optional[_Iterable[_Union[_worker_pb2.TransferFigures, _Mapping]]] = ..., layout_hash: _Optional[str] = ..., protocol_version: _Optional[int] = ..., kv_sharding: _Optional[str] = ..., package_version: _Optional[str] = ..., step_error: _Optional[float] = ..., step_bias: _Optional[float] = ..., predicted_steps: _Optional[int] = ...) -> None: ...

class GetTraceRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class GetTraceResponse(_message.Message):
    __slots__ = ("request_id", "events", "silent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    events: _containers.RepeatedCompositeFieldContainer[_worker_pb2.TraceEvent]
    silent: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_id: _Optional[str] = ..., events: _Optional[_Iterable[_Union[_worker_pb2.TraceEvent, _Mapping]]] = ..., silent: _Optional[_Iterable[str]] = ...) -> None: ...
