"""How much of a trace's prompts a prefix cache of a given size could serve.

The hit ratio is the share of all prompt blocks that lie in the leading run of cached ones. Requests come one
after the other, each is looked up whole before its own blocks are added, and all of these stay: the ratio is
a property of trace and cache, not of speeds. The cache is the engine's own block manager, with a block for
each hash id. Knows nothing of workers or of time.

What is called an LRU elsewhere touches a request's blocks in order of the prompt, known or not. The block
manager differs in two things: later blocks of a prompt age first, and a block that lies behind a gap (its
prefix was evicted, so that it is computed again) keeps its age. `lru_hits` is that other one, to tell what
the difference is worth; benchmarks/prefix_hits.py writes both.

Published ratios count a prompt's last block like the others, although the prompt need not fill it. The engine
shares full blocks only, and of a prompt that is known whole it computes the last one again, for its logits:
`full_only` studies that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from ...engine.block_manager import BlockManager
from ...proto.errors import ConfigError
from ..load.trace_formats import HASH_BLOCK_TOKENS, TraceRecord

_HASH_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixHits:
    """What a cache did for a trace."""

    blocks: int
    """Of all prompts together."""
    hits: int
    """Of these, blocks in the leading run of cached ones."""

    @property
    def ratio(self) -> float:
        return self.hits / self.blocks


def prefix_hits(
    records: Sequence[TraceRecord], num_blocks: int | None = None, *, full_only: bool = False
) -> PrefixHits:
    """Hits with a block manager of `num_blocks`; None is one that never has to evict.

    Args:
        full_only: share what the engine's block tables share, and not a last block that is partly empty.

    Raises:
        ConfigError: the trace has no hash ids, or the cache cannot hold the longest prompt.
    """
    prompts = _prompts(records)
    longest = max(map(len, prompts))
    if num_blocks is None:
        # While a prompt is computed, blocks of it may stand twice.
        num_blocks = len({hash_id for prompt in prompts for hash_id in prompt}) + longest
    _check(num_blocks, longest)
    manager = BlockManager(num_blocks, HASH_BLOCK_TOKENS)
    hits = 0
    for record, prompt in zip(records, prompts, strict=True):
        hashes = [hash_id.to_bytes(_HASH_BYTES, "little") for hash_id in prompt]
        full = record.input_tokens // HASH_BLOCK_TOKENS if full_only else len(hashes)
        usable = (record.input_tokens - 1) // HASH_BLOCK_TOKENS if full_only else len(hashes)
        table = manager.match_prefix(hashes[:usable])
        hits += len(table)
        table += manager.allocate(len(hashes) - len(table))
        for block_id, block_hash in zip(table, hashes[:full], strict=False):
            manager.seal(block_id, block_hash)
        manager.release(table)
    return PrefixHits(blocks=sum(map(len, prompts)), hits=hits)


def lru_hits(records: Sequence[TraceRecord], num_blocks: int) -> PrefixHits:
    """Hits with a plain LRU of `num_blocks`: a request is looked up, then each of its blocks becomes the most
    recently used one, in order of the prompt, and the least recently used ones go.

    Raises:
        ConfigError: as `prefix_hits`.
    """
    prompts = _prompts(records)
    _check(num_blocks, max(map(len, prompts)))
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for prompt in prompts:
        hits += next((i for i, hash_id in enumerate(prompt) if hash_id not in cached), len(prompt))
        for hash_id in prompt:
            cached[hash_id] = None
            cached.move_to_end(hash_id)
        while len(cached) > num_blocks:
            cached.popitem(last=False)
    return PrefixHits(blocks=sum(map(len, prompts)), hits=hits)


def _prompts(records: Sequence[TraceRecord]) -> list[tuple[int, ...]]:
    prompts = [record.hash_ids for record in records]
    if not any(prompts):
        raise ConfigError("the trace has no hash ids; prefix hits need a trace like mooncake-conversation")
    return prompts


def _check(num_blocks: int, longest: int) -> None:
    if num_blocks < longest:
        raise ConfigError(f"a cache of {num_blocks} blocks cannot hold a prompt of {longest}; allow more")
