from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openmae.errors import SpecError
from openmae.models.masking import (
    Mask,
    count_visible,
    mask_from_noise,
    random_mask,
    split_units,
)

SEEDS = st.integers(min_value=-(2**31), max_value=2**63 - 1)


def draw(samples: list[int] | Tensor, seed: int = 0, epoch: int = 0, units: int = 49, ratio: float = 0.6) -> Mask:
    return random_mask(torch.as_tensor(samples), seed=seed, epoch=epoch, num_units=units, mask_ratio=ratio)


@given(
    samples=st.lists(st.integers(min_value=0, max_value=2**40), min_size=1, max_size=8),
    seed=SEEDS,
    epoch=st.integers(min_value=0, max_value=2000),
    units=st.integers(min_value=2, max_value=300),
    data=st.data(),
)
def test_every_unit_is_either_visible_or_masked_in_ascending_order(samples, seed, epoch, units, data) -> None:
    visible = data.draw(st.integers(min_value=1, max_value=units - 1))
    ratio = 1 - (visible + 0.5) / units
    mask = draw(samples, seed, epoch, units, ratio)
    assert mask.visible_BV.shape == (len(samples), visible)
    assert mask.masked_BM.shape == (len(samples), units - visible)
    assert (mask.visible_BV.diff(dim=1) > 0).all()
    assert (mask.masked_BM.diff(dim=1) > 0).all()
    assert torch.equal(torch.cat(mask, dim=1).sort(dim=1).values, torch.arange(units).expand(len(samples), -1))


@given(
    samples=st.lists(st.integers(min_value=0, max_value=2**40), min_size=1, max_size=12),
    seed=SEEDS,
    epoch=st.integers(min_value=0, max_value=2000),
    data=st.data(),
)
def test_mask_depends_on_its_address_and_not_on_its_batch(samples, seed, epoch, data) -> None:
    together = draw(samples, seed, epoch)
    place = data.draw(st.integers(min_value=0, max_value=len(samples) - 1))
    alone = draw([samples[place]], seed, epoch)
    assert torch.equal(together.visible_BV[place], alone.visible_BV[0])
    assert torch.equal(together.masked_BM[place], alone.masked_BM[0])


def test_random_state_of_torch_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw([3, 4])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw([3, 4]).visible_BV, first.visible_BV)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"samples": range(1, 4001)}])
def test_another_address_gives_an_independent_mask(change) -> None:
    samples = list(change.pop("samples", range(4000)))
    one = draw(list(range(4000)), units=64, ratio=0.75).visible_BV
    other = draw(samples, units=64, ratio=0.75, **change).visible_BV
    overlap = (one.unsqueeze(2) == other.unsqueeze(1)).sum(dim=(1, 2)).float()
    assert overlap.mean().item() == pytest.approx(16 * 16 / 64, abs=0.12)  # six deviations of the mean
    assert (overlap == 16).sum() == 0


def test_units_and_pairs_of_units_are_visible_equally_often() -> None:
    samples, units, visible = 20_000, 16, 4
    seen = torch.zeros(samples, units, dtype=torch.float64)
    seen.scatter_(1, draw(torch.arange(samples), seed=7, epoch=3, units=units, ratio=0.75).visible_BV, 1.0)
    together = seen.T @ seen
    expected = samples * visible / units
    chi_square = ((together.diagonal() - expected) ** 2 / expected).sum().item()
    assert chi_square < 37.7  # 15 degrees of freedom, one in a thousand
    pairs = together[~torch.eye(units, dtype=torch.bool)]
    expected = samples * visible * (visible - 1) / (units * (units - 1))
    assert ((pairs - expected).abs() < 5 * expected**0.5).all()


def test_mask_is_the_same_in_every_version() -> None:
    mask = draw([0, 1], seed=42, epoch=5, units=8, ratio=0.5)
    assert mask.visible_BV.tolist() == splitmix_masks([0, 1], seed=42, epoch=5, units=8, visible=4)


def splitmix_masks(samples: list[int], seed: int, epoch: int, units: int, visible: int) -> list[list[int]]:
    """Compute the same with Python's integers, after SplitMix64's reference code (Vigna, public domain)."""

    def mix(x: int) -> int:
        z = (x + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def signed(x: int) -> int:
        return x - 2**64 if x >= 2**63 else x

    masks = []
    for sample in samples:
        key = mix(mix(sample + mix(seed)) + mix(epoch))
        noise = [signed(mix(key + unit * 0x9E3779B97F4A7C15)) for unit in range(units)]
        masks.append(sorted(sorted(range(units), key=noise.__getitem__)[:visible]))
    return masks


def test_noise_is_ranked_per_sample_with_stable_ties() -> None:
    mask = mask_from_noise(torch.tensor([[0.9, 0.1, 0.5, 0.1], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert mask.visible_BV.tolist() == [[1, 3], [0, 1]]
    assert mask.masked_BM.tolist() == [[0, 2], [2, 3]]


@given(rows=st.integers(1, 4), columns=st.integers(2, 4), split=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_split_units_are_the_tokens_of_each_unit_in_order(rows: int, columns: int, split: int, seed: int) -> None:
    mask = draw([0, 1], seed, units=rows * columns, ratio=0.5)
    tokens = split_units(mask, (rows, columns), split)
    finer = torch.arange(rows * split * columns * split).view(rows * split, columns * split)
    for units, parts in zip(mask, tokens, strict=True):
        for sample in range(2):
            squares = []
            for unit in units[sample].tolist():
                top, left = unit // columns * split, unit % columns * split
                squares.append(finer[top : top + split, left : left + split].flatten())
            assert torch.equal(parts[sample], torch.cat(squares))


@pytest.mark.parametrize(("units", "ratio", "visible"), [(196, 0.75, 49), (49, 0.6, 19), (256, 0.75, 64), (2, 0.5, 1)])
def test_visible_units_are_counted_as_in_the_papers(units: int, ratio: float, visible: int) -> None:
    assert count_visible(units, ratio) == visible


@pytest.mark.parametrize(
    ("units", "ratio", "what"),
    [
        (49, 0.99, "no unit"),
        (1, 0.6, "no unit"),
        (49, 1.0, "no unit"),
        (49, 0.0, "every unit"),
        (0, 0.5, "no unit"),
    ],
)
def test_ratio_that_leaves_nothing_visible_or_masked_is_refused(units: int, ratio: float, what: str) -> None:
    with pytest.raises(SpecError) as error:
        count_visible(units, ratio)
    assert error.value.problem == (
        f"model.mask_ratio: some units must be visible and some masked; {ratio} of {units} leaves {what} visible."
    )
    assert "dataset.augmentation.input_size" in error.value.fix
    with pytest.raises(SpecError):
        draw([0], units=units, ratio=ratio)


@pytest.mark.parametrize(("targets", "count"), [(1.0, 9), (0.5, 4), (0.01, 1)])
def test_share_of_the_masked_units_is_predicted(targets: float, count: int) -> None:
    samples = torch.arange(200)
    address = {"seed": 0, "epoch": 1, "num_units": 12, "mask_ratio": 0.75}
    whole, some = random_mask(samples, **address), random_mask(samples, **address, targets=targets)
    assert torch.equal(some.visible_BV, whole.visible_BV), "the encoder's task is the same"
    assert some.masked_BM.shape == (200, count)
    assert targets < 1 or torch.equal(some.masked_BM, whole.masked_BM)
    for chosen, masked in zip(some.masked_BM.tolist(), whole.masked_BM.tolist(), strict=True):
        assert chosen == sorted(chosen)
        assert set(chosen) <= set(masked)
    often = torch.bincount(some.masked_BM.flatten(), minlength=12).float()
    assert often.min() > 0.5 * often.mean(), "some units are hardly ever predicted"
