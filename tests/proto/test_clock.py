"""The live source of chance."""

from __future__ import annotations

from diphase.proto.clock import SystemRng, system_rng


def test_bits_are_as_many_as_asked_for_and_all_of_them_vary() -> None:
    rng = SystemRng()
    for bits in (1, 7, 8, 53, 64, 96, 256):
        seen_or = seen_not = 0
        for _ in range(200):
            value = rng.getrandbits(bits)
            assert 0 <= value < 2**bits
            seen_or |= value
            seen_not |= ~value & (2**bits - 1)
        assert seen_or == seen_not == 2**bits - 1


def test_numbers_do_not_repeat() -> None:
    rng = system_rng()
    assert len({rng.getrandbits(96) for _ in range(5000)}) == 5000
    assert SystemRng().getrandbits(64) != SystemRng().getrandbits(64)


def test_fractions_are_below_one() -> None:
    rng = system_rng()
    values = [rng.random() for _ in range(2000)]
    assert 0.0 <= min(values) < 0.1
    assert 0.9 < max(values) < 1.0
