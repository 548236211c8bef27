"""Keeps sequences' block tables: looks their prefix up, grows them, shares what is full, gives them back.

Both schedulers own one. It knows sequences and the block manager; not steps, priorities or requests.
"""

from __future__ import annotations

from ..proto.block_hash import extend_hashes
from ..proto.errors import PromptTooLong
from .block_manager import BlockManager
from .sequence import Sequence


class BlockTables:
    """`root` is what block 0 of every sequence is chained to (proto/block_hash.py). None: sequences have no
    token ids (the planner's simulator), only hashes that they were given; further blocks are not shared."""

    def __init__(self, blocks: BlockManager, root: bytes | None) -> None:
        self.blocks = blocks
        self._root = root

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)

    def check_fits(self, sequence: Sequence) -> None:
        """Raises:
        PromptTooLong: the pool cannot hold the sequence even when it is empty.
        """
        needed, total = self.num_blocks_for(sequence.num_tokens), self.blocks.num_blocks
        if needed > total:
            raise PromptTooLong(
                f"the prompt needs {needed} KV blocks and the pool has {total}; shorten it or raise "
                "engine.kv_cache_mib"
            )

    def hash_blocks(self, sequence: Sequence) -> None:
        """Completes the hashes of the sequence's full blocks."""
        if (
            self._root is not None
            and len(sequence.block_hashes) < sequence.num_tokens // self.blocks.block_size
        ):
            sequence.block_hashes = extend_hashes(
                sequence.block_hashes, sequence.token_ids, self.blocks.block_size, self._root
            )

    def start(self, sequence: Sequence) -> None:
        """Gives a sequence that has nothing the longest prefix that the cache knows. At least one token stays
        to be computed: the next one is sampled from its logits."""
        self.hash_blocks(sequence)
        sequence.block_table = self.blocks.match_prefix(self._usable_hashes(sequence))
        sequence.num_computed = len(sequence.block_table) * self.blocks.block_size
        sequence.num_cached = min(sequence.num_computed, sequence.num_prompt_tokens)

    def shortfall(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that the sequence lacks to hold `num_tokens` tokens."""
        return max(0, self.num_blocks_for(num_tokens) - len(sequence.block_table))

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Allocates blocks until the table holds `num_tokens` tokens.

        Raises:
            OutOfBlocks: the pool has too few; the table is unchanged.
        """
        missing = self.shortfall(sequence, num_tokens)
        if missing:
            sequence.block_table += self.blocks.allocate(missing)

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """The next `num_tokens` tokens have their KV: blocks that became full may be shared from now on."""
        first_full = sequence.num_computed // self.blocks.block_size
        sequence.num_computed += num_tokens
        self._seal(sequence, first_full)

    def seal_computed(self, sequence: Sequence) -> None:
        """Shares the full blocks of a sequence whose KV came from elsewhere."""
        self._seal(sequence, 0)

    def release(self, sequence: Sequence) -> None:
        """Gives the sequence's references back and makes it one that has nothing; its tokens stay."""
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0

    def _usable_hashes(self, sequence: Sequence) -> list[bytes]:
        return sequence.block_hashes[: (sequence.num_tokens - 1) // self.blocks.block_size]

    def _seal(self, sequence: Sequence, first_full: int) -> None:
        num_full = sequence.num_computed // self.blocks.block_size
        if num_full > first_full:
            self.hash_blocks(sequence)
            for i in range(first_full, min(num_full, len(sequence.block_hashes))):
                self.blocks.seal(sequence.block_table[i], sequence.block_hashes[i])
