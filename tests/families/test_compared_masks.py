"""Vision tokens found by comparing embeddings with those of a prompt's token ids."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dartfx.runtime import vision_mask

IMAGE, MARKER, UNKNOWN = 7, 8, -200
IDS = torch.tensor([[1, MARKER, IMAGE, IMAGE, IMAGE, MARKER, 2], [3, 4, 5, 1, 2, 3, 4]])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def merged(model: Model, ids: Tensor) -> Tensor:
    embeds = model.embed(ids.clamp(0)).detach()
    image = (ids == IMAGE) | (ids == UNKNOWN)
    embeds[image] = torch.randn(int(image.sum()), 4)
    return embeds


def test_placeholders_are_found_and_markers_are_not() -> None:
    model = Model()
    embeds = merged(model, IDS)
    embeds[IDS == MARKER] = torch.randn(4)
    with vision_mask.text_of(model, IDS):
        found = vision_mask.compared(embeds)
    assert found is not None
    assert torch.equal(found.mask, IDS == IMAGE)
    assert found.rows == 3
    assert vision_mask.find(embeds) is found  # without another comparison
    assert vision_mask.compared(merged(model, IDS)) is None  # outside of the block


def test_placeholders_outside_of_the_vocabulary() -> None:
    model, ids = Model(), IDS.masked_fill(IDS == IMAGE, UNKNOWN)
    with vision_mask.text_of(model, ids):
        found = vision_mask.compared(merged(model, ids))
    assert found is not None
    assert torch.equal(found.mask, ids == UNKNOWN)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled, so that all differ": lambda x: x * 2,
    "of another length": lambda x: x[:, 1:],
    "of another width": lambda x: x[..., 1:],
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_embeddings_that_cannot_be_compared(change: Callable[[Tensor], Tensor]) -> None:
    model = Model()
    with vision_mask.text_of(model, IDS):
        assert vision_mask.compared(change(merged(model, IDS))) is None
        assert vision_mask.compared(model.embed(IDS).detach()) is None


def test_a_model_that_embeds_nothing_changes_nothing() -> None:
    with vision_mask.text_of(nn.Linear(2, 2), IDS):
        assert vision_mask.compared(torch.randn(2, 7, 4)) is None
