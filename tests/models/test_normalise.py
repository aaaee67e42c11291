from __future__ import annotations

import pytest
import torch

from openmae.models.normalise import Normaliser

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalise_and_undo(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (2, 3, 5, 6)).to(dtype).contiguous(memory_format=torch.channels_last)
    kept = images.clone()
    normaliser = Normaliser(MEAN, STD)
    result = normaliser(images)
    expected = (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, kept)
    torch.testing.assert_close(normaliser.undo(result), images.float(), atol=1e-3, rtol=0)
