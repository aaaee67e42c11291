import pytest
import torch

from openmae.engines.batching import as_input, run_split
from openmae.engines.metadata import ModelCard
from openmae.models.build import ModelConfig


def recording(seen):
    def run(images):
        seen.append(len(images))
        return {"logits": 2 * images, "sum": images.sum(1)}

    return run


@pytest.mark.parametrize(
    ("count", "smallest", "largest", "batches"),
    [
        (1, 1, 4, [1]),
        (4, 1, 4, [4]),
        (9, 1, 4, [4, 4, 1]),
        (9, 3, 4, [4, 4, 3]),
        (2, 4, 4, [4]),
        (6, 4, 4, [4, 4]),
        (0, 1, 4, [1]),
        (0, 4, 4, [4]),
    ],
)
def test_batches_are_split_and_padded(count, smallest, largest, batches):
    images, seen = torch.arange(count * 3.0).view(count, 3), []
    outputs = run_split(recording(seen), images, smallest, largest)
    assert seen == batches
    assert torch.equal(outputs["logits"], 2 * images)
    assert torch.equal(outputs["sum"], images.sum(1))


def card(preprocessing):
    config = ModelConfig("vit_tiny_patch16", (32, 48), num_classes=3)
    return ModelCard("finetune", config, (0.5, 0.25, 0.0), (0.25, 0.5, 1.0), preprocessing=preprocessing)


def test_images_are_normalised_unless_the_model_does():
    images = torch.full((2, 3, 32, 48), 255, dtype=torch.uint8)
    found = as_input(images, card(preprocessing=False))
    assert found.dtype == torch.float32
    assert found[0, :, 0, 0].tolist() == [2.0, 1.5, 1.0]


def test_a_model_that_normalises_gets_bytes_with_the_channels_last():
    images = torch.tensor([-3.0, 99.6, 300.0]).view(1, 3, 1, 1).expand(1, 3, 32, 48)
    found = as_input(images, card(preprocessing=True))
    assert found.dtype == torch.uint8
    assert found.shape == (1, 32, 48, 3)
    assert found.is_contiguous()
    assert found[0, 5, 7].tolist() == [0, 100, 255]
