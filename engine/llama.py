"""The Llama decoder over a paged KV pool: embedding, layers, logits. Knows tensors and kernels, no requests.

Rows of a step are tokens of any sequences; which ones belong together only attention knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..checkpoints.model_config import ModelConfig
from ..kernels.linear import Epilogue
from ..kernels.paged_attention import AttentionStep
from ..kernels.registry import Kernels
from ..kernels.rope import rope_table
from ..proto.errors import InternalError
from .base import LayerHook
from .ranks import ALONE, Ranks
from .weights import LayerWeights, LlamaWeights

_HEAD_ROWS = 32
"""Rows that the output projection is given at once, so that their bits do not depend on how many sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """One step's tokens; `num_rows` of them and of padding are computed."""

    num_rows: int
    token_ids: torch.Tensor
    """[num_tokens] int64"""
    positions: torch.Tensor
    """[num_tokens] int64"""
    block_ids: torch.Tensor
    """[num_tokens] int64: where each token's KV goes."""
    slots: torch.Tensor
    """[num_tokens] int64"""
    attention: AttentionStep


class Llama:
    """Weights, rotary table and the views of the pool by layer."""

    def __init__(
        self,
        config: ModelConfig,
        weights: LlamaWeights,
        kernels: Kernels,
        pool: torch.Tensor,
        max_context: int,
        *,
        ranks: Ranks = ALONE,
    ) -> None:
        """`config`: of the layers as this rank has them."""
        self.config = config
        self._ranks = ranks
        self._weights = weights
        self._kernels = kernels
        self._layer_pools = [pool[:, i] for i in range(config.num_layers)]
        self._cos, self._sin = rope_table(config.rope_inv_freq(), max_context)
        self.attention = kernels.paged_attention(pool, config.num_q_heads, max_context)

    def padded_rows(self, num_tokens: int, prompts: bool) -> int:
        """Rows that a step of `num_tokens` tokens is best given; `prompts`: it does not only decode."""
        return self._weights.layers[0].qkv.padded_rows(num_tokens, prompts)

    def forward(self, step: StepTensors, on_layer: LayerHook | None = None) -> torch.Tensor:
        """Writes the tokens' KV and returns their hidden states before the last norm, [num_tokens,
        hidden_size].

        Args:
            on_layer: called with i once the KV of layer i is in the pool, that of every rank.
        """
        config = self.config
        num_tokens = len(step.token_ids)
        embedding = self._weights.embedding
        # Rows beyond the tokens are multiplied and attended with them, and otherwise left alone.
        x = embedding.new_zeros(step.num_rows, config.hidden_size)
        x[:num_tokens] = F.embedding(step.token_ids, embedding)
        normed = torch.zeros_like(x)
        attended = x.new_zeros(step.num_rows, config.num_q_heads, config.head_dim)
        written, summed = self._ranks.hooks(on_layer)
        turns = self._cos[step.positions], self._sin[step.positions]  # [num_tokens, 1, head_dim] each
        for i, layer in enumerate(self._weights.layers):
            self._norm(normed, x, layer.attention_norm, num_tokens)
            q, kv = self._project(layer, normed, turns)
            self._kernels.kv_write(self._layer_pools[i], kv, step.block_ids, step.slots)
            if written is not None:
                written(i)
            step.attention.run(attended, q, i)
            x = self._ranks.add(layer.output, attended.flatten(1), x, num_tokens)
            if summed is not None:
                summed(i)
            self._norm(normed, x, layer.mlp_norm, num_tokens)
            gate = layer.gate(normed, Epilogue.SILU)
            x = self._ranks.add(layer.down, layer.up(normed, Epilogue.MUL, gate), x, num_tokens)
        return x[:num_tokens]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] as forward() gives -> [num_tokens, vocab_size], same dtype."""
        return torch.cat([self._logits(rows) for rows in hidden.split(_HEAD_ROWS)])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        num_tokens = len(hidden)
        head = self._weights.lm_head
        if head is None:
            raise InternalError("only rank 0 has the output projection")
        normed = hidden.new_zeros(head.padded_rows(num_tokens, prompts=False), self.config.hidden_size)
        self._norm(normed, hidden, self._weights.final_norm, num_tokens)
        return head(normed)[:num_tokens]

    def _norm(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, num_tokens: int) -> None:
        self._kernels.rms_norm(out[:num_tokens], x[:num_tokens], weight, self.config.rms_norm_eps)

    def _project(
        self, layer: LayerWeights, normed: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [num_rows, num_q_heads, head_dim]; keys and values [num_tokens, 2, num_kv_heads,
        head_dim]."""
        num_q, num_kv = self.config.num_q_heads, self.config.num_kv_heads
        heads = layer.qkv(normed).view(-1, num_q + 2 * num_kv, self.config.head_dim)
        tokens = heads[: len(turns[0])]
        self._kernels.rope(tokens[:, : num_q + num_kv], *turns)
        return heads[:, :num_q], tokens[:, num_q:].unflatten(1, (2, num_kv))
