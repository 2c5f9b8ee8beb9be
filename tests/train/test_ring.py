"""The ring of negatives."""

from __future__ import annotations

import pytest
import torch

from tcsae.store.errors import RunMismatch
from tcsae.train.ring import PIECE, Ring

CPU = torch.device("cpu")


def filled(size: int, pushes: list[int]) -> Ring:
    ring, number = Ring(size, 2, torch.float16, CPU), 0
    for n in pushes:
        values = torch.arange(number, number + n)
        ring.push(values[:, None].half().repeat(1, 2), values, values + 1, values % 3)
        number += n
    return ring


def test_the_newest_rows_replace_the_oldest() -> None:
    ring = filled(5, [3, 3, 1])
    assert ring.document.tolist() == [5, 6, 2, 3, 4]
    assert ring.activations[:, 0].tolist() == [5, 6, 2, 3, 4]
    assert ring.position.tolist() == [6, 7, 3, 4, 5]
    assert ring.source.tolist() == [2, 0, 2, 0, 1]


def test_empty_slots_are_no_keys() -> None:
    ring = filled(5, [3])
    (keys,) = ring.keys(lambda raw: raw.float())
    assert keys.document.tolist() == [0, 1, 2]
    assert list(Ring(5, 2, torch.float16, CPU).keys(lambda raw: raw)) == []


def test_keys_are_encoded_afresh_in_pieces_that_cover_the_ring() -> None:
    ring = filled(PIECE + 3, [PIECE, 3])
    for scale in (1.0, 2.0):
        pieces = list(ring.keys(lambda raw, scale=scale: raw.float() * scale))  # type: ignore[misc]
        assert [len(piece.code) for piece in pieces] == [PIECE, 3]
        assert torch.equal(torch.cat([piece.code for piece in pieces]), ring.activations.float() * scale)


def test_a_restored_ring_goes_on_as_the_saved_one() -> None:
    ring, restored = filled(5, [3, 4]), Ring(5, 2, torch.float16, CPU)
    restored.load_state_dict(ring.state_dict())
    for r in (ring, restored):
        r.push(torch.full((2, 2), 9.0).half(), *[torch.tensor([9, 9])] * 3)
    assert torch.equal(ring.document, restored.document)
    assert torch.equal(ring.activations, restored.activations)


def test_a_ring_of_another_size_is_refused() -> None:
    with pytest.raises(RunMismatch, match=r"ring of \(5, 2\)"):
        Ring(6, 2, torch.float16, CPU).load_state_dict(filled(5, [3]).state_dict())
