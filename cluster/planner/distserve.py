"""DistServe's published coefficients and KV capacities (OPT on A100-80G), as step times.

The files are of its released simulator (github.com/LLMServe/DistServe, simdistserve/estimators). Knows
nothing of other tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...proto.errors import ConfigError
from ...router.two_regime_step_time import DecodeTerms, PrefillTerms, TwoRegimeStepTime
from .table_files import existing, missing, positive_int, read_object, read_rows

FOLDER = "distserve_profile"
SOURCE = "https://github.com/LLMServe/DistServe/tree/main/simdistserve/estimators/profile_data"
ENGINES = ("distserve", "vllm")

MS = 1e-3
PREFILL_HOP_MS_PER_STAGE = 1.0
"""Each stage of a prefill takes as many milliseconds more as there are stages."""
OVERHEAD_MS = 2.0
"""Of Ray, on the first stage of a step."""
OVERHEAD_MS_PER_TOKEN = 1e-4


def distserve_step_time(
    folder: Path, *, model: str, tp: int, pp: int = 1, engine: str = "distserve", overheads: bool = False
) -> TwoRegimeStepTime:
    """The step time of `model` (its name with or without the owner) on A100-80G.

    Args:
        overheads: whether the first stage has the overhead of Ray, and a worker of one stage a pipeline's
            hop, as the released simulator has both. The coefficients were timed around calls through Ray
            (evaluation/0-test-single-forward-performance/sut of the same repository), so that they are in
            there already.

    Raises:
        ConfigError: no such engine, model or tp was measured, or the file is missing or malformed.
    """
    if pp < 1:
        raise ConfigError(f"pp = {pp}; a worker has at least 1 pipeline stage")
    path, by_tp = _measured(folder, model, engine)
    if str(tp) not in by_tp:
        raise missing(f"{model} on {engine} with tp", tp, by_tp)
    entry = by_tp[str(tp)]
    try:
        prefill = PrefillTerms(*_terms(entry["prefill"]))
        small = DecodeTerms(*_terms(entry["decoding_smallbs"]))
        large = DecodeTerms(*_terms(entry["decoding_largebs"]))
        large_batch = int(entry["decoding_large_small_bs_threshold"])
    except (KeyError, TypeError, ValueError) as exc:
        raise ConfigError(f"{path}: the entry of {model}, tp {tp}, is malformed: {exc!r}") from exc
    return TwoRegimeStepTime(
        prefill=prefill,
        small=small,
        large=large,
        large_batch=large_batch,
        stages=pp,
        prefill_hop_s=PREFILL_HOP_MS_PER_STAGE * pp * MS if overheads or pp > 1 else 0.0,
        overhead_s=OVERHEAD_MS * MS if overheads else 0.0,
        overhead_per_token_s=OVERHEAD_MS_PER_TOKEN * MS if overheads else 0.0,
    )


def check_measured(folder: Path, *, model: str, engine: str) -> None:
    """
    Raises:
        ConfigError: no such engine or model was measured, or a file is missing or malformed.
    """
    _measured(folder, model, engine)
    distserve_kv_capacities(folder, model=model)


def distserve_kv_capacities(folder: Path, *, model: str) -> dict[tuple[int, int], int]:
    """Tokens of KV that a worker of `model` on A100-80G holds, by (tp, pp).

    Raises:
        ConfigError: there is no such model, or the file is missing or malformed.
    """
    return _of_model(read_kv_capacities(folder), model)


def read_kv_capacities(folder: Path) -> dict[str, dict[tuple[int, int], int]]:
    """Tokens of KV by model and (tp, pp).

    Raises:
        ConfigError: the file is missing or malformed.
    """
    by_model: dict[str, dict[tuple[int, int], int]] = {}
    for name, tp, pp, tokens in read_rows(
        existing(folder, f"{FOLDER}/max_num_tokens.csv", SOURCE), _capacity
    ):
        by_model.setdefault(name, {})[tp, pp] = tokens
    return by_model


def _measured(folder: Path, model: str, engine: str) -> tuple[Path, dict[str, Any]]:
    """(the file, its entries of the model by tp)."""
    if engine not in ENGINES:
        raise missing("the engine", engine, ENGINES)
    path = existing(folder, f"{FOLDER}/profiler-a100-80g.{engine}.json", SOURCE)
    return path, _of_model(read_object(path), model)


def _capacity(row: Mapping[str, str]) -> tuple[str, int, int, int]:
    tp, pp, tokens = (positive_int(row[column]) for column in ("tp", "pp", "max_num_tokens"))
    return row["model"], tp, pp, tokens


def _of_model(table: Mapping[str, Any], model: str) -> dict[Any, Any]:
    for name, value in table.items():
        if model in {name, name.rpartition("/")[2]}:
            return dict(value)
    raise missing("the model", model, table)


def _terms(values: list[float]) -> tuple[float, float, float]:
    base, second, third = (float(value) * MS for value in values)
    return base, second, third
