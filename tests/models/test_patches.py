from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from openmae.models.patches import denormalise_units, normalise_units, patchify, select_units, unpatchify

SHAPES = st.tuples(
    st.integers(1, 3),  # batch
    st.sampled_from([1, 3, 4]),  # channels
    st.integers(1, 4),  # rows
    st.integers(1, 4),  # columns
    st.sampled_from([1, 2, 4, 7]),  # side
)


def images_of(shape: tuple[int, int, int, int, int]) -> torch.Tensor:
    batch, channels, rows, columns, side = shape
    return torch.randn(batch, channels, rows * side, columns * side)


@given(shape=SHAPES)
def test_unpatchify_inverts_patchify(shape) -> None:
    images = images_of(shape)
    side = shape[-1]
    assert torch.equal(unpatchify(patchify(images, side), side, (images.shape[2], images.shape[3])), images)


@given(shape=SHAPES)
def test_values_of_a_unit_are_ordered_row_column_channel(shape) -> None:
    images = images_of(shape)
    batch, channels, rows, columns, side = shape
    units = patchify(images, side)
    assert units.shape == (batch, rows * columns, side * side * channels)
    for unit in range(rows * columns):
        top, left = unit // columns * side, unit % columns * side
        square = images[:, :, top : top + side, left : left + side]
        assert torch.equal(units[:, unit], square.permute(0, 2, 3, 1).flatten(1))


@given(shape=SHAPES, data=st.data())
def test_select_units_is_patchify_then_gather(shape, data) -> None:
    images = images_of(shape)
    batch, channels, rows, columns, side = shape
    count = data.draw(st.integers(0, rows * columns))
    index = torch.rand(batch, rows * columns).argsort(dim=1)[:, :count]
    for layout in (images, images.to(memory_format=torch.channels_last), images.mT.contiguous().mT):
        selected = select_units(layout, index, side)
        assert selected.shape == (batch, count, side, side, channels)
        expected = torch.stack([patchify(images, side)[b, index[b]] for b in range(batch)])
        assert torch.equal(selected.reshape(expected.shape), expected)


@given(shape=SHAPES.filter(lambda shape: shape[-1] > 1), scale=st.sampled_from([1e-2, 1.0, 50.0]))
def test_normalised_units_are_standardised_and_invertible(shape, scale) -> None:
    units = patchify(images_of(shape).double(), shape[-1]) * scale + 3
    normalised = normalise_units(units)
    torch.testing.assert_close(normalised.mean(dim=-1), torch.zeros(units.shape[:2]).double(), atol=1e-9, rtol=0)
    expected = (units - units.mean(-1, keepdim=True)) / (units.var(-1, keepdim=True) + 1e-6) ** 0.5
    torch.testing.assert_close(normalised, expected)
    torch.testing.assert_close(denormalise_units(normalised, units), units)


def test_constant_unit_normalises_to_zeros() -> None:
    units = torch.full((1, 2, 12), 0.25)
    assert torch.equal(normalise_units(units), torch.zeros(1, 2, 12))
    assert torch.equal(denormalise_units(torch.zeros(1, 2, 12), units), units)
