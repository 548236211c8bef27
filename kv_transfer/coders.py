"""The codecs of one worker with what is known of their speed, and the choice of one for each hand-off."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..proto.clock import Clock
from ..proto.errors import TransferError
from ..proto.kv_layout import KvLayout
from .codecs.codec import RAW, Codec, load_codecs
from .codecs.codec_calibration import calibrate
from .codecs.codec_choice import Choice, CodecEstimate, LinkEstimate, Rate, choose

FORGET_TOKENS = 65_536
"""Prompt tokens later, how quick they were computed weighs 1/e of its first weight."""


class Coders:
    """`names` are the codecs beside raw that this worker may use."""

    def __init__(self, names: Iterable[str], layout: KvLayout, clock: Clock) -> None:
        self._codecs = {name: codec for name, codec in load_codecs(names).items() if name != RAW}
        self._clock = clock
        self.estimates: dict[str, CodecEstimate] = {
            name: calibrate(codec, layout, clock) for name, codec in self._codecs.items()
        }
        self.prefill = Rate(forget=FORGET_TOKENS)
        """Tokens a second that this worker computes, which stands for what its peers do."""

    @property
    def names(self) -> list[str]:
        """Least change of the KV first."""
        return list(self._codecs)

    def shared(self, names: Collection[str]) -> list[str]:
        """Those of ours that a peer has too."""
        return [name for name in self._codecs if name in names]

    def codec(self, name: str) -> Codec:
        """
        Raises:
            TransferError: this worker may not use it.
        """
        if name not in self._codecs:
            raise TransferError(
                f"codec {name!r} is not one of this worker's ({', '.join(self._codecs) or 'none'}); "
                "set kv_transfer.codecs alike on both"
            )
        return self._codecs[name]

    def choose(
        self,
        size_bytes: int,
        num_tokens: int,
        *,
        link: LinkEstimate,
        backlog_bytes: int,
        names: Iterable[str],
        recompute: bool,
    ) -> Choice:
        """How `size_bytes` of KV of `num_tokens` tokens get over this link soonest, behind `backlog_bytes`
        of other KV. `names`: codecs that both ends have."""
        return choose(
            size_bytes,
            num_tokens=num_tokens,
            backlog_bytes=backlog_bytes,
            bytes_per_s=link.settled_bytes_per_s(self._clock.now()),
            allowed=[self._codecs[name] for name in names],
            estimates=self.estimates,
            prefill_tokens_per_s=self.prefill.value if recompute else None,
        )
