"""Public request traces by name: where their files lie and where to get them; a log of one's own by its path.

Azure's (Patel et al., "Splitwise", ISCA 2024) have arrival times and lengths; Mooncake's (Qin et al., FAST
2025) also have hash ids of the prompt's blocks; the others have lengths only. Knows nothing of what a file
says; see trace_formats.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...proto.errors import ConfigError
from .trace_formats import TraceRecord, read_trace

DATA_VARIABLE = "DIPHASE_DATA"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFile:
    """A trace that can be asked for by name."""

    path: str
    """Below the data folder."""
    source: str
    """Where to get it."""


_AZURE = "https://github.com/Azure/AzurePublicDataset/tree/master/data"
_MOONCAKE = "https://github.com/kvcache-ai/Mooncake/tree/main/FAST25-release/traces"

TRACES: Mapping[str, TraceFile] = {
    "azure-code": TraceFile(path="azure2023/AzureLLMInferenceTrace_code.csv", source=_AZURE),
    "azure-conv": TraceFile(path="azure2023/AzureLLMInferenceTrace_conv.csv", source=_AZURE),
    "mooncake-conversation": TraceFile(path="mooncake/conversation_trace.jsonl", source=_MOONCAKE),
    "mooncake-synthetic": TraceFile(path="mooncake/synthetic_trace.jsonl", source=_MOONCAKE),
    "sharegpt": TraceFile(
        path="sharegpt_lengths/sharegpt_8k_filtered_stats_llama2_tokenizer.csv",
        source="https://github.com/microsoft/sarathi-serve/tree/main/data/processed_traces",
    ),
    "humaneval": TraceFile(
        path="humaneval/humaneval_opt_lengths.csv",
        source="https://github.com/openai/human-eval (lengths of prompts and solutions in OPT's tokens)",
    ),
    "arxiv": TraceFile(
        path="arxiv_lengths/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
        source="https://github.com/microsoft/vidur/tree/main/data/processed_traces",
    ),
}


def data_folder(option: str | None, environ: Mapping[str, str]) -> Path:
    """Where traces lie: the option, else DIPHASE_DATA, else `../shared/data` beside the repository.

    Raises:
        ConfigError: the option is empty.
    """
    if option == "":
        raise ConfigError("--data is empty; name the folder of the traces, or leave it out")
    given = option or environ.get(DATA_VARIABLE)
    if given:
        return Path(given)
    return Path(__file__).resolve().parents[3] / "shared" / "data"


def load_trace(name: str, folder: Path) -> list[TraceRecord]:
    """The records of the trace `name`, in order of arrival; a name with a suffix or a slash is the path of a
    log of one's own.

    Raises:
        ConfigError: no trace has that name; its file is missing (the message says where to get it) or has no
            requests; a row is malformed (the message names file, line and field).
    """
    if name not in TRACES:
        if os.sep in name or Path(name).suffix:
            return read_trace(Path(name))
        raise ConfigError(
            f"no trace is called {name!r}; use one of {', '.join(TRACES)}, or the path of a .csv or .jsonl"
        )
    trace = TRACES[name]
    path = folder / trace.path
    if not path.is_file():
        raise ConfigError(
            f"the trace {name} needs the file {path}; get {path.name} from {trace.source} and put it there, "
            f"or name the folder that has {trace.path} with --data or {DATA_VARIABLE}"
        )
    return read_trace(path, sort=True)
