"""What waits behind copies when a peer of shm is dropped."""

from __future__ import annotations

import numpy as np
from diphase.kv_transfer.transports.shm import ShmMedium, _Attachment
from diphase.kv_transfer.transports.shm_copier import Copy
from diphase.kv_transfer.transports.socket_peer import Job, Peer


def test_a_dropped_peer_is_not_quiet_while_a_notice_waits_for_its_turn() -> None:
    medium = ShmMedium([], lambda: None)
    job = Job(
        transfer_id=0,
        peer="p",
        segments=np.empty((0, 5), dtype=np.int64),
        num_bytes=0,
        tag=b"notice",
        deadline=0.0,
    )
    peer = Peer(incarnation="p")
    copy = Copy(peer=peer, job=job, slices=iter(()), left=0)
    peer.attachment = attachment = _Attachment([], copies=[copy])
    assert medium.quiet(peer), "no job of a peer that stays was given up"
    peer.down = "the cable"
    assert not medium.quiet(peer)
    medium.detach(peer)
    assert peer.attachment is attachment
    attachment.copies.clear()
    medium.detach(peer)
    assert medium.quiet(peer)
    assert peer.attachment is None
