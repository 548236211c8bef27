"""docs/handoff.md and the tables that run are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diphase.kv_transfer import machine as k
from diphase.kv_transfer.decode_side import (
    DECODE_EVENTS,
    DECODE_TABLE,
)
from diphase.kv_transfer.prefill_side import (
    PREFILL_EVENTS,
    PREFILL_TABLE,
)


@pytest.mark.parametrize(
    ("name", "table", "events"),
    [("prefill", PREFILL_TABLE, PREFILL_EVENTS), ("decode", DECODE_TABLE, DECODE_EVENTS)],
)
def test_the_page_about_the_protocol_shows_these_tables(name: str, table: Any, events: Any) -> None:
    def cell(entry: Any) -> str:
        if isinstance(entry, k.Refusal):
            return f"– {entry.reason}" if entry.counted else "–"
        handler: str = entry.__name__
        return handler.strip("_").replace("_", " ")

    lines = [f"| event | {' | '.join(table)} |", f"| --- |{' --- |' * len(table)}"]
    lines += [f"| {e.__name__} | {' | '.join(cell(row[e]) for row in table.values())} |" for e in events]
    page = (Path(__file__).parents[2] / "docs" / "handoff.md").read_text(encoding="utf-8")
    shown = page.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]
    assert shown.strip().splitlines() == lines
