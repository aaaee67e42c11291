from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from openmae.data.decode import ImageFile
from openmae.data.transforms import (
    EvalTransform,
    FinetuneTransform,
    PretrainTransform,
    Transform,
    centre_box,
    crop_pct,
    random_box,
    rng_at,
)
from openmae.errors import SpecError
from openmae.models.normalise import Normaliser

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICY = "rand-m9-mstd0.5-inc1"

sides = st.integers(1, 2000)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth 300 x 200 JPEG."""
    rows, columns = np.mgrid[0:200, 0:300]
    pixels = np.stack([rows, columns * 0.8, 128 + 100 * np.sin(columns / 20)], axis=-1)
    path = tmp_path_factory.mktemp("photo") / "a.jpg"
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)
    return path


def apply(transform: Transform, path: Path, address: tuple[int, int, int] = (0, 0, 0)) -> torch.Tensor:
    with ImageFile(path) as image_file:
        return transform(image_file, rng_at(*address))


def finetune(size: tuple[int, int] = (64, 48), in_chans: int = 3, **options: object) -> FinetuneTransform:
    crop = PretrainTransform(size, in_chans)
    mean, std = (*MEAN, 0.5)[:in_chans], (*STD, 0.25)[:in_chans]
    return FinetuneTransform(crop, mean, std, **options)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- randomness


def test_random_numbers_depend_only_on_the_address() -> None:
    draws = {
        (seed, epoch, index, stream): rng_at(seed, epoch, index, stream).random()
        for seed in (-1, 0, 1, 2**63)
        for epoch in (0, 1, 7)
        for index in (0, 1, 7)
        for stream in ("augment", "shuffle")
    }
    assert len(set(draws.values())) == len(draws)
    assert draws[1, 7, 1, "augment"] == rng_at(1, 7, 1).random()


@pytest.mark.parametrize(
    "transform",
    [
        PretrainTransform((64, 48), interpolation="random"),
        finetune(auto_aug=POLICY, color_jitter=0.4, re_prob=0.5),
        finetune(auto_aug="augmix-m5-w4-d2"),
        finetune(auto_aug="original-mstd0.5"),
        finetune(in_chans=1, auto_aug=POLICY, color_jitter=0.4, re_prob=1.0),
    ],
    ids=["pretrain", "finetune", "augmix", "original", "grey"],
)
def test_samples_are_addressed(photo: Path, transform: Transform) -> None:
    first = apply(transform, photo, (5, 2, 9))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for address in ((5, 2, 8), (5, 3, 9), (6, 2, 9)):
        assert not torch.equal(first, apply(transform, photo, address))
    assert torch.equal(first, apply(transform, photo, (5, 2, 9)))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert first.shape == (transform.in_chans, *transform.size)
    assert first.dtype == torch.uint8


# ---------------------------------------------------------------------------------------------- crops


@given(st.tuples(sides, sides), st.floats(0.01, 1), st.floats(0.3, 1), st.floats(1, 3), st.integers(0, 99))
def test_random_box_fits_and_keeps_its_bounds(
    size: tuple[int, int], low: float, narrow: float, wide: float, index: int
) -> None:
    left, top, right, bottom = random_box(size, (low, 1.0), (narrow, wide), rng_at(0, 0, index))
    assert 0 <= left < right <= size[1]
    assert 0 <= top < bottom <= size[0]
    if min(right - left, bottom - top) > 20:
        assert narrow * 0.9 < (right - left) / (bottom - top) < wide * 1.1


def test_random_box_area_is_uniform() -> None:
    boxes = [random_box((1000, 1000), (0.2, 1.0), (0.99, 1.01), rng_at(0, 0, i)) for i in range(2000)]
    shares = np.array([(r - x) * (b - y) for x, y, r, b in boxes]) / 1e6
    assert shares.min() >= 0.19
    np.testing.assert_allclose(np.quantile(shares, [0.25, 0.5, 0.75]), [0.4, 0.6, 0.8], atol=0.03)


@given(st.tuples(sides, sides), st.tuples(st.integers(1, 600), st.integers(1, 600)))
def test_centre_box_is_centred(size: tuple[int, int], out: tuple[int, int]) -> None:
    left, top, right, bottom = centre_box(size, out)
    assert 0 <= left < right <= size[1]
    assert 0 <= top < bottom <= size[0]
    assert abs(left - (size[1] - right)) <= 1
    assert abs(top - (size[0] - bottom)) <= 1


@pytest.mark.parametrize(
    ("size", "kept"),
    [((112, 112), 0.875), ((224, 224), 0.875), ((240, 240), 1.0), ((384, 384), 1.0), ((224, 448), 1.0)],
)
def test_crop_fraction_equals_official_code(size: tuple[int, int], kept: float) -> None:
    """MAE's util/datasets.py: ``crop_pct = 224 / 256 if input_size <= 224 else 1.0``."""
    assert crop_pct(size) == kept
    assert centre_box((1000, 2000), (256, 256)) == (500, 0, 1500, 1000)


def test_pretraining_and_evaluation_are_bicubic_unless_set(photo: Path) -> None:
    assert PretrainTransform((32, 32)).interpolation == EvalTransform((32, 32)).interpolation == "bicubic"
    default, bilinear = (apply(EvalTransform((64, 64), interpolation=i), photo) for i in ("bicubic", "bilinear"))
    assert torch.equal(apply(EvalTransform((64, 64)), photo), default)
    assert not torch.equal(default, bilinear)


@pytest.mark.parametrize("side", [112, 256])
def test_evaluation_equals_official_transform(side: int, photo: Path) -> None:
    """MAE's util/datasets.py on torchvision: resize the short side, crop the centre."""
    from torchvision import transforms

    kept = 224 / 256 if side <= 224 else 1.0
    official = transforms.Compose(
        [
            transforms.Resize(int(side / kept), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
        ]
    )
    with Image.open(photo) as image:
        expected = torch.from_numpy(np.array(official(image.convert("RGB")))).permute(2, 0, 1).float()
    ours = apply(EvalTransform((side, side)), photo).float()
    assert (ours - expected).abs().mean() < 2.0


def test_centre_box_equals_resize_and_crop() -> None:
    # resize the short side to 256, crop 224
    assert centre_box((256, 256), (224, 224)) == (16, 16, 240, 240)
    assert centre_box((512, 1024), (224, 224)) == (288, 32, 736, 480)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_eval_equals_resize_then_crop(photo: Path, interpolation: str) -> None:
    ours = apply(EvalTransform((112, 112), interpolation=interpolation), photo)  # type: ignore[arg-type]
    resized = Image.open(photo).resize((192, 128), getattr(Image.Resampling, interpolation.upper()))
    theirs = np.asarray(resized.crop((40, 8, 152, 120)))
    difference = ours.permute(1, 2, 0).numpy().astype(float) - theirs
    assert np.abs(difference).mean() < 1.5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pretrain_equals_pillow_crop_and_resize(photo: Path, interpolation: str) -> None:
    transform = PretrainTransform((64, 96), scale=(0.8, 1), hflip=1, interpolation=interpolation)  # type: ignore[arg-type]
    ours = apply(transform, photo)
    box = random_box((200, 300), (0.8, 1), (3 / 4, 4 / 3), rng_at(0, 0, 0))
    image = Image.open(photo).resize((96, 64), getattr(Image.Resampling, interpolation.upper()), box=box)
    difference = ours.flip(-1).permute(1, 2, 0).numpy().astype(float) - np.asarray(image)
    assert np.abs(difference).mean() < 1.5


def test_flip_probability(photo: Path) -> None:
    plain = apply(PretrainTransform((32, 32), hflip=0), photo)
    assert torch.equal(apply(PretrainTransform((32, 32), hflip=1), photo).flip(-1), plain)


def test_scaled_jpeg_resembles_the_full_one(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:1000, 0:1600]
    pixels = np.stack([rows / 4, columns / 7, 128 + 100 * np.sin(columns / 60)], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    transforms: list[tuple[Transform, float]] = [
        (EvalTransform((64, 64)), 1.0),
        (EvalTransform((200, 90)), 1.0),
    ]
    transforms += [(PretrainTransform((64, 64)), 2.5)] * 5  # shifted by half a pixel at most
    for index, (transform, limit) in enumerate(transforms):
        jpeg, png = (apply(transform, tmp_path / name, (0, 0, index)).float() for name in ("a.jpg", "a.png"))
        assert (jpeg - png).abs().mean() < limit


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("options", [{}, {"auto_aug": POLICY, "color_jitter": 0.4, "re_prob": 1.0}])
def test_channels(photo: Path, in_chans: int, options: dict[str, object]) -> None:
    for index in range(4):
        image = apply(finetune((40, 56), in_chans, **options), photo, (0, 0, index))
        assert image.shape == (in_chans, 40, 56)
    assert apply(EvalTransform((40, 56), in_chans), photo).shape == (in_chans, 40, 56)


def test_sixteen_bits_stay_float(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (50, 60), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    for transform in (
        PretrainTransform((32, 32), 1, interpolation="bicubic"),
        finetune((32, 32), 1, auto_aug=POLICY, color_jitter=0.4, re_prob=1.0),
        EvalTransform((32, 32), 1),
    ):
        image = apply(transform, tmp_path / "a.png")
        assert image.dtype == torch.float32
        assert 0 <= image.min() < image.max() <= 255
    assert apply(EvalTransform((32, 32), 1), tmp_path / "a.png").unique().numel() > 256


# --------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("policy", ["rand-q9", "nonsense"])
def test_unknown_policy(policy: str) -> None:
    with pytest.raises(SpecError, match=f"dataset.augmentation.auto_aug: .* {policy!r}") as caught:
        finetune(auto_aug=policy)
    assert "rand-m9-mstd0.5-inc1" in caught.value.fix


def test_no_policy_for_four_channels(caplog: pytest.LogCaptureFixture) -> None:
    finetune(in_chans=4, auto_aug=POLICY)
    assert "auto_aug is off: it works on 1 or 3 channels, not on 4" in caplog.text
    caplog.clear()
    finetune(in_chans=4)
    assert not caplog.text


def test_erasing_is_normal_noise_on_a_rectangle(photo: Path) -> None:
    plain = apply(finetune((96, 96)), photo)
    erased = apply(finetune((96, 96), re_prob=1.0), photo)
    changed = (plain != erased).any(0)
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert 0.015 < area / 96**2 < 0.35
    patch = Normaliser(MEAN, STD)(erased[None])[0, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert abs(patch.mean()) < 0.2
    assert 0.8 < patch.std() < 1.1
    assert changed.sum() / area > 0.95


def test_colour_jitter_keeps_alpha_and_moves_colour(photo: Path) -> None:
    plain, jittered = (apply(finetune(in_chans=4, color_jitter=c), photo) for c in (0.0, 0.5))
    assert not torch.equal(plain[:3], jittered[:3])
    assert torch.equal(plain[3], jittered[3])


def test_posterize_keeps_a_bit_at_every_magnitude() -> None:
    transform = finetune(auto_aug="rand-m10-n1-mstd100-inc1")
    names = {op.name: op for op in transform._policy.ops}  # type: ignore[union-attr]
    posterize = [op for name, op in names.items() if name.startswith("Posterize")]
    assert posterize
    grey = Image.new("RGB", (8, 8), (200, 100, 50))
    for op in posterize:
        assert {op.level_fn(level, op.hparams)[0] for level in np.linspace(0, 10, 50)} <= set(range(1, 9))
        op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
        op(grey)
