import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raytune_emotion.config import AugmentConfig
from raytune_emotion.data.augment import Triple, augment, decide, normalise, splitmix64, symmetric_beta, uniforms
from raytune_emotion.data.loader import Batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # pixels stay as they are
SIDE, K = 20, 13

share = st.sampled_from([0.0, 0.3, 1.0])
# Everything but what mixes rows.
within_rows = st.builds(
    AugmentConfig,
    flip=share,
    crop_scale=st.sampled_from([0.2, 0.9, 1.0]),
    colour=share,
    grey=share,
    erase=share,
    operations=st.sampled_from([0, 2, 11]),
    magnitude=share,
)


def random_batch(count: int, seed: int = 0, side: int = SIDE) -> Batch:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8))
    prob = torch.from_numpy(rng.dirichlet(np.ones(K), count).astype(np.float32))
    return Batch(x, prob, rng.permutation(10 * count)[:count])


def constant_batch(count: int, side: int = SIDE) -> Batch:
    """Row b has the value b everywhere, and one-hot distributions."""
    x = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, side, side, 3).contiguous()
    return Batch(x, torch.eye(count), np.arange(count))


def part(batch: Batch, which: list[int]) -> Batch:
    return Batch(batch.x_BHWC[which], batch.prob_BK[which], batch.rows_B[which])


def augmented(
    batch: Batch, config: AugmentConfig, *, mean: Triple = MEAN, std: Triple = STD, seed: int = 0, epoch: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    side, device = batch.x_BHWC.shape[1], batch.x_BHWC.device
    (decisions,) = decide(config, [batch.rows_B], seed=seed, epoch=epoch, side=side, device=device)
    return augment(batch, decisions, mean=mean, std=std)


def plain(batch: Batch, config: AugmentConfig, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    """Augmented pixels on the scale of 0 to 255, [B, H, W, C]."""
    return augmented(batch, config, **PLAIN, seed=seed, epoch=epoch)[0].permute(0, 2, 3, 1)


# ---- normalise


def test_normalise_is_the_customary_formula() -> None:
    x = random_batch(5).x_BHWC
    expected = (x.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    got = normalise(x, MEAN, STD)
    assert got.dtype == torch.float32
    assert got.shape == (5, 3, SIDE, SIDE)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.permute(0, 2, 3, 1).double(), expected, atol=1e-5, rtol=0)


def test_the_recipe_none_decides_nothing() -> None:
    cpu = torch.device("cpu")
    (decisions,) = decide(AugmentConfig(recipe="none"), [np.arange(4)], seed=0, epoch=0, side=SIDE, device=cpu)
    assert decisions == {}


def test_all_off_is_bit_identical_to_normalise() -> None:
    batch = random_batch(6)
    off = AugmentConfig(flip=0.0)
    assert off == AugmentConfig(flip=0.0, crop_scale=1.0, colour=0.0, grey=0.0, erase=0.0, mixup=0.0, cutmix=0.0)
    x, prob = augmented(batch, off, seed=1, epoch=2)
    assert torch.equal(x, normalise(batch.x_BHWC, MEAN, STD))
    assert torch.equal(prob, batch.prob_BK)


# ---- every operation


@settings(max_examples=25)
@given(config=within_rows, mixup=share, cutmix=share)
def test_result_is_float32_channels_last_and_the_batch_is_unchanged(
    config: AugmentConfig, mixup: float, cutmix: float
) -> None:
    config = AugmentConfig(**{**vars(config), "mixup": mixup, "cutmix": cutmix})
    batch, same = random_batch(4), random_batch(4)
    before = torch.get_rng_state()
    x, prob = augmented(batch, config)
    assert x.dtype == prob.dtype == torch.float32
    assert x.shape == (4, 3, SIDE, SIDE)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert bool(x.isfinite().all())
    torch.testing.assert_close(prob.sum(1), torch.ones(4), atol=1e-5, rtol=0)
    assert torch.equal(batch.x_BHWC, same.x_BHWC)
    assert torch.equal(batch.prob_BK, same.prob_BK)
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=25)
@given(config=within_rows, seed=st.integers(0, 2**31 - 1), order=st.permutations(range(9)), cut=st.integers(0, 9))
def test_a_row_is_augmented_alike_in_every_batch(config: AugmentConfig, seed: int, order: list[int], cut: int) -> None:
    batch = random_batch(9)
    whole, _ = augmented(batch, config, seed=seed, epoch=3)
    for which in (order[:cut], order[cut:]):
        if which:
            x, prob = augmented(part(batch, which), config, seed=seed, epoch=3)
            assert torch.equal(x, whole[which])
            assert torch.equal(prob, batch.prob_BK[which])


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(flip=0.5),
        AugmentConfig(flip=0.0, crop_scale=0.5),
        AugmentConfig(flip=0.0, colour=0.5),
        AugmentConfig(flip=0.0, grey=0.5),
        AugmentConfig(flip=0.0, erase=0.5),
        AugmentConfig(flip=0.0, operations=2),
        AugmentConfig(flip=0.0, mixup=0.5),
        AugmentConfig(flip=0.0, cutmix=0.5),
    ],
    ids=str,
)
def test_epochs_and_seeds_differ_and_repeat(config: AugmentConfig) -> None:
    batch = random_batch(16)
    results = {(seed, epoch): plain(batch, config, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert torch.equal(results[0, 0], plain(batch, config, 0, 0))
    keys = list(results)
    for i, one in enumerate(keys):
        for other in keys[:i]:
            assert not torch.equal(results[one], results[other])


def test_many_batches_are_decided_at_once_as_each_alone() -> None:
    config = AugmentConfig(
        flip=0.5, crop_scale=0.3, colour=0.4, grey=0.2, erase=0.3, operations=3, mixup=0.4, cutmix=1.0
    )
    rows = np.split(np.random.default_rng(0).permutation(9000), [4000, 4100, 4103, 8999])
    options = {"seed": 1, "epoch": 2, "side": SIDE, "device": torch.device("cpu")}
    for rows_B, decisions in zip(rows, decide(config, rows, **options), strict=True):
        (alone,) = decide(config, [rows_B], **options)
        assert alone.keys() == decisions.keys()
        assert all(torch.equal(decisions[name], alone[name]) for name in alone)
        assert {len(value) for value in decisions.values()} == {len(rows_B)}
    assert list(decide(AugmentConfig(flip=0.0), rows, **options)) == [{}] * len(rows)


def test_one_operation_does_not_change_the_draws_of_another() -> None:
    batch = random_batch(30)
    alone = plain(batch, AugmentConfig(flip=0.5, colour=0.4))
    together = plain(batch, AugmentConfig(flip=0.5, colour=0.4, erase=1.0))
    kept = together != 0
    assert 0.5 < kept.float().mean() < 0.98
    assert torch.equal(alone[kept], together[kept])


# ---- mirror image and crop


def test_flip_always_is_the_mirror_image_and_twice_is_identity() -> None:
    batch = random_batch(5)
    once = plain(batch, AugmentConfig(flip=1.0))
    assert torch.equal(once, batch.x_BHWC.flip(2).float())
    again = Batch(once.to(torch.uint8), batch.prob_BK, batch.rows_B)
    assert torch.equal(plain(again, AugmentConfig(flip=1.0)), batch.x_BHWC.float())


def test_flip_happens_as_often_as_asked_and_leaves_the_others_alone() -> None:
    batch = random_batch(800, side=4)
    x = plain(batch, AugmentConfig(flip=0.3))
    same = (x == batch.x_BHWC).all((1, 2, 3))
    mirrored = (x == batch.x_BHWC.flip(2)).all((1, 2, 3))
    assert bool((same ^ mirrored).all())
    assert 0.24 < mirrored.float().mean() < 0.36


def test_crop_lies_inside_and_keeps_share_and_aspect() -> None:
    side, count, least = 50, 300, 0.3
    ramp = torch.arange(side, dtype=torch.uint8) * 5
    x = torch.stack(
        [
            ramp[None, :].expand(side, side),
            ramp[:, None].expand(side, side),
            torch.zeros(side, side, dtype=torch.uint8),
        ],
        dim=-1,
    ).expand(count, -1, -1, -1)
    batch = Batch(x.contiguous(), torch.full((count, K), 1 / K), np.arange(count))
    out = plain(batch, AugmentConfig(flip=0.0, crop_scale=least)) / 5  # each value is now where it came from, px
    assert out[..., :2].min() >= 0
    assert out[..., :2].max() <= side - 1
    middle = slice(side // 2 - 5, side // 2 + 5)
    width = out[:, 0, middle, 0].diff(dim=1).mean(1)
    height = out[:, middle, 0, 1].diff(dim=1).mean(1)
    left, top = (
        (out[:, 0, side // 2, 0] - width * (side // 2 + 0.5)),
        (out[:, side // 2, 0, 1] - height * (side // 2 + 0.5)),
    )
    for start, length in ((left, width), (top, height)):
        assert (start + 0.5).min() > -1e-3
        assert (start + 0.5 + length * side).max() < side + 1e-3
    assert (width * height).min() > least - 1e-3
    assert (width * height).min() < least + 0.05
    assert (width * height).max() > 0.95
    assert (width / height).max() < 4 / 3 + 1e-3
    assert (width / height).min() > 3 / 4 - 1e-3
    assert (width / height).std() > 0.05
    # Every column is cut alike, and every line.
    torch.testing.assert_close(out[..., 0], out[:, :1, :, 0].expand(-1, side, -1), atol=1e-3, rtol=0)
    torch.testing.assert_close(out[..., 1], out[:, :, :1, 1].expand(-1, -1, side), atol=1e-3, rtol=0)


def test_crop_and_mirror_image_together_are_the_mirrored_crop() -> None:
    batch = random_batch(8)
    straight = plain(batch, AugmentConfig(flip=0.0, crop_scale=0.4))
    mirrored = plain(batch, AugmentConfig(flip=1.0, crop_scale=0.4))
    torch.testing.assert_close(mirrored, straight.flip(2), atol=0.01, rtol=0)


# ---- colour


def luma(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype)


def test_grey_always_has_no_colour_and_the_same_luma() -> None:
    batch = random_batch(4)
    x = plain(batch, AugmentConfig(flip=0.0, grey=1.0))
    torch.testing.assert_close(x, luma(batch.x_BHWC.float())[..., None].expand_as(x), atol=1e-3, rtol=0)


def test_grey_as_often_as_asked_and_the_others_bit_identical() -> None:
    batch = random_batch(600, side=4)
    x = plain(batch, AugmentConfig(flip=0.0, grey=0.4))
    without = (x[..., 0] - x[..., 1]).abs().amax((1, 2)) < 1e-3
    assert 0.32 < without.float().mean() < 0.48
    assert torch.equal(x[~without], batch.x_BHWC[~without].float())


def test_colour_is_brightness_contrast_about_the_mean_and_saturation() -> None:
    strength, count = 0.3, 60
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.integers(90, 130, (count, SIDE, SIDE, 3), dtype=np.uint8))  # far from being clipped
    rows = np.arange(count)
    prob = torch.full((count, K), 1 / K)
    x = plain(Batch(noise, prob, rows), AugmentConfig(flip=0.0, colour=strength)).double()
    # An even grey of the same rows shows the brightness alone.
    even = plain(Batch(torch.full_like(noise, 100), prob, rows), AugmentConfig(flip=0.0, colour=strength))
    brightness = even.mean((1, 2, 3)).double() / 100
    assert even.flatten(1).std(1).max() < 1e-3

    grey_in, grey_out = luma(noise.double()), luma(x)
    torch.testing.assert_close(grey_out.mean((1, 2)), brightness * grey_in.mean((1, 2)), atol=1e-2, rtol=0)
    spread_in = grey_in - grey_in.mean((1, 2), keepdim=True)
    spread_out = grey_out - grey_out.mean((1, 2), keepdim=True)
    contrast = spread_out.flatten(1).norm(dim=1) / spread_in.flatten(1).norm(dim=1) / brightness
    torch.testing.assert_close(spread_out, (brightness * contrast)[:, None, None] * spread_in, atol=1e-2, rtol=0)
    hue_in, hue_out = noise.double() - grey_in[..., None], x - grey_out[..., None]
    saturation = hue_out.flatten(1).norm(dim=1) / hue_in.flatten(1).norm(dim=1) / brightness / contrast
    factor = (brightness * contrast * saturation)[:, None, None, None]
    torch.testing.assert_close(hue_out, factor * hue_in, atol=1e-2, rtol=0)
    for factors in (brightness, contrast, saturation):
        assert 1 - strength - 1e-3 < factors.min() < 1 - strength / 2
        assert 1 + strength / 2 < factors.max() < 1 + strength + 1e-3
    pairs = torch.corrcoef(torch.stack([brightness, contrast, saturation])) - torch.eye(3)
    assert pairs.abs().max() < 0.4


def test_colour_stays_in_the_range_of_pixels() -> None:
    x = plain(random_batch(40), AugmentConfig(flip=0.0, colour=1.0))
    assert x.min() == 0
    assert x.max() == 255


# ---- operations chosen at random


def test_an_operation_of_each_row_moves_the_face_or_changes_its_colours_as_far_as_the_magnitude_says() -> None:
    side, count, magnitude = 41, 2200, 0.5
    place = torch.arange(side, dtype=torch.uint8) * 3 + 60
    faces = torch.stack([*torch.meshgrid(place, place, indexing="xy"), torch.full((side, side), 200)], dim=-1)
    batch = Batch(faces.to(torch.uint8).expand(count, -1, -1, -1), torch.full((count, K), 1 / K), np.arange(count))
    config = AugmentConfig(flip=0.0, operations=1, magnitude=magnitude)
    out = plain(batch, config)

    # Where the pixels about the centre come from, in sides.
    middle = side // 2
    at = (out[..., :2].double() - 60) / 3 - middle
    centre = at[:, middle, middle] / side
    along_x, along_y = (
        at[:, middle, middle + 1] - at[:, middle, middle],
        at[:, middle + 1, middle] - at[:, middle, middle],
    )
    found = torch.cat([along_x, along_y, centre], dim=1)
    shear, move, angle = 0.3 * magnitude, 0.45 * magnitude, math.radians(30 * magnitude)
    cos, sin = math.cos(angle), math.sin(angle)
    maps = {
        "none": [1, 0, 0, 1, 0, 0],
        **{f"shear_x{s}": [1, 0, s * shear, 1, 0, 0] for s in (-1, 1)},
        **{f"shear_y{s}": [1, s * shear, 0, 1, 0, 0] for s in (-1, 1)},
        **{f"translate_x{s}": [1, 0, 0, 1, s * move, 0] for s in (-1, 1)},
        **{f"translate_y{s}": [1, 0, 0, 1, 0, s * move] for s in (-1, 1)},
        **{f"rotate{s}": [cos, s * sin, -s * sin, cos, 0, 0] for s in (-1, 1)},
    }
    same_colours = (out[..., 2] - 200).abs().amax((1, 2)) < 1e-2
    moved = torch.zeros(count, dtype=torch.bool)
    for name, expected in maps.items():
        alike = same_colours & ((found - torch.tensor(expected)).abs().amax(1) < 0.01)
        if name == "none":
            untouched = alike
        else:
            assert 0.02 < alike.float().mean() < 0.075, name  # one of 11 operations, in one of two directions
            moved |= alike
    assert 0.06 < untouched.float().mean() < 0.13

    coloured = ~moved & ~untouched
    assert 0.38 < coloured.float().mean() < 0.53  # brightness, contrast, saturation, posterising and solarising
    blue = out[coloured][:, middle, middle, 2]
    red_in, blue_in = 60.0 + 3 * middle, 200.0
    grey_in = 0.299 * red_in + 0.587 * red_in + 0.114 * blue_in
    expected_blue = [
        255 - blue_in,
        blue_in - blue_in % 2 ** (4 * magnitude),
        *(min(255.0, blue_in * (1 + sign * 0.9 * magnitude)) for sign in (-1, 1)),
        # The mean of the face is its centre, so contrast and saturation change blue alike.
        *(min(255.0, grey_in + (1 + sign * 0.9 * magnitude) * (blue_in - grey_in)) for sign in (-1, 1)),
    ]
    near = (blue[:, None] - torch.tensor(expected_blue)).abs().amin(1)
    assert near.max() < 0.1


@pytest.mark.parametrize("operations", [1, 2, 11])
def test_as_many_different_operations_as_asked_are_chosen_for_each_row(operations: int) -> None:
    config = AugmentConfig(flip=0.0, operations=operations, magnitude=1.0)
    cpu = torch.device("cpu")
    (decisions,) = decide(config, [np.arange(3000)], seed=0, epoch=0, side=SIDE, device=cpu)
    value = {name: tensor.flatten() for name, tensor in decisions.items()}
    b_c, b_c_s = value["own_colour"] + value["grey"], value["own_colour"]
    brightness = b_c + value["pivot"]
    changed = [
        *(value[name].abs() > 1e-6 for name in ("warp_x", "warp_y")),
        (b_c_s / b_c - 1).abs() > 1e-6,
        (b_c / brightness - 1).abs() > 1e-6,
        (brightness - 1).abs() > 1e-6,
        value["posterise"] > 0,
        value["solarise_from"] < 256,
    ]
    for each in changed:
        assert each.float().mean() == pytest.approx(operations / 11, abs=0.04)
    count = torch.stack(changed).sum(0)
    assert count.max() == min(operations, len(changed))


def test_operations_without_magnitude_leave_the_pixels() -> None:
    batch = random_batch(8)
    x = plain(batch, AugmentConfig(flip=0.0, operations=11, magnitude=0.0))
    torch.testing.assert_close(x, batch.x_BHWC.float(), atol=1e-2, rtol=0)


# ---- erasing


def test_erases_one_rectangle_of_the_mean_colour_as_often_as_asked() -> None:
    side, count = 32, 400
    batch = Batch(
        torch.full((count, side, side, 3), 200, dtype=torch.uint8), torch.full((count, K), 1 / K), np.arange(count)
    )
    x, _ = augmented(batch, AugmentConfig(flip=0.0, erase=0.5))
    gone = (x == 0).all(1)
    assert torch.equal(gone, (x == 0).any(1))
    assert torch.equal(x[~gone[:, None].expand_as(x)], normalise(batch.x_BHWC, MEAN, STD)[~gone[:, None].expand_as(x)])
    lines, columns = gone.any(2), gone.any(1)
    assert torch.equal(gone, lines[:, :, None] & columns[:, None, :])
    for edge in (lines, columns):  # in one piece
        assert int((edge.int().diff(dim=1) == 1).sum(1).add(edge[:, 0].int()).max()) == 1
    area = gone.float().mean((1, 2))
    hit = area > 0
    assert 0.42 < hit.float().mean() < 0.58
    assert area[hit].min() > 0.015
    assert 0.25 < area.max() < 0.36


# ---- mixup and cutmix


def test_mixup_mixes_pixels_and_distributions_by_the_same_share() -> None:
    batch = constant_batch(200, side=4)
    x, prob = augmented(batch, AugmentConfig(flip=0.0, mixup=0.8), **PLAIN)
    own = prob.diagonal()
    before = torch.arange(200).roll(1)
    torch.testing.assert_close(prob[torch.arange(200), before], 1 - own)
    torch.testing.assert_close(prob.sum(1), torch.ones(200))
    mixed = own * torch.arange(200) + (1 - own) * before
    torch.testing.assert_close(x, mixed[:, None, None, None].expand_as(x), atol=1e-3, rtol=0)
    assert stats.kstest(own.numpy(), stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_cutmix_mixes_distributions_by_the_pixels_replaced() -> None:
    count, side = 200, 16
    batch = constant_batch(count, side)
    x, prob = augmented(batch, AugmentConfig(flip=0.0, cutmix=1.0), **PLAIN)
    values = x[:, 0].round().long()
    own, before = torch.arange(count), torch.arange(count).roll(1)
    kept = values == own[:, None, None]
    assert bool((kept | (values == before[:, None, None])).all())
    share_kept = kept.float().mean((1, 2))
    torch.testing.assert_close(prob.diagonal(), share_kept, atol=1e-6, rtol=0)
    torch.testing.assert_close(prob[own, before], 1 - share_kept, atol=1e-6, rtol=0)
    assert torch.equal(~kept, (~kept).any(2)[:, :, None] & (~kept).any(1)[:, None, :])  # a rectangle
    assert share_kept.min() < 0.4
    assert share_kept.std() > 0.1


def test_mixup_and_cutmix_together_are_one_or_the_other() -> None:
    count = 200
    batch = constant_batch(count)
    x, prob = augmented(batch, AugmentConfig(flip=0.0, mixup=1.0, cutmix=1.0), **PLAIN)
    only_mixup, _ = augmented(batch, AugmentConfig(flip=0.0, mixup=1.0), **PLAIN)
    only_cutmix, _ = augmented(batch, AugmentConfig(flip=0.0, cutmix=1.0), **PLAIN)
    as_mixup = (x == only_mixup).all(-1).all(-1).all(-1)
    as_cutmix = (x == only_cutmix).all(-1).all(-1).all(-1)
    assert bool((as_mixup | as_cutmix).all())
    assert 0.4 < as_mixup.float().mean() < 0.6
    torch.testing.assert_close(prob.sum(1), torch.ones(count))
    torch.testing.assert_close(prob @ torch.arange(count).float(), x.mean((1, 2, 3)), atol=1e-2, rtol=1e-5)


def test_the_share_a_row_keeps_is_its_own_in_every_batch() -> None:
    batch = constant_batch(12)
    config = AugmentConfig(flip=0.0, mixup=0.5, cutmix=0.5)
    whole = augmented(batch, config, **PLAIN)[1].diagonal()
    which = [7, 2, 11, 3]
    shares = augmented(part(batch, which), config, **PLAIN)[1][range(4), which]
    assert torch.equal(shares, whole[which])


# ---- random numbers


def test_splitmix64_gives_the_published_sequence() -> None:
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.array([1234567], np.uint64) + golden * np.arange(5, dtype=np.uint64)
    # The sequence for seed 1234567 of rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64.
    assert splitmix64(state).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_uniforms_are_uniform_and_independent_between_rows_draws_epochs_and_seeds() -> None:
    rows = np.arange(2000)
    u = uniforms(0, 0, rows, 8)
    assert u.shape == (8, 2000)
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    others = np.concatenate(
        [u, uniforms(0, 1, rows, 8), uniforms(1, 0, rows, 8), uniforms(1, 1, rows, 8), u[:, 1:-1]], axis=1
    )
    assert len(np.unique(others)) == 4 * u.size
    neighbours = np.stack(
        [u[0, :-1], u[0, 1:], u[1, :-1], uniforms(0, 1, rows, 1)[0, :-1], uniforms(1, 0, rows, 1)[0, :-1]]
    )
    correlation = np.corrcoef(neighbours) - np.eye(5)
    assert np.abs(correlation).max() < 5 / np.sqrt(2000)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 1.0, 2.5, 30.0])
def test_symmetric_beta_follows_the_beta_distribution(alpha: float) -> None:
    u = uniforms(5, 0, np.arange(20000), 2)
    x = symmetric_beta(u[0], u[1], alpha)
    assert x.min() >= 0
    assert x.max() <= 1
    # Kolmogorov and Smirnov's test at 0.001, away from the ends, where a small alpha meets the rounding of 1 - x.
    at = np.linspace(0.001, 0.999, 999)
    shares = np.searchsorted(np.sort(x), at) / len(x)
    assert np.abs(shares - stats.beta(alpha, alpha).cdf(at)).max() < 1.95 / np.sqrt(len(x))


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 1e6, 1e300])
def test_symmetric_beta_of_extreme_alpha_is_a_share(alpha: float) -> None:
    u = np.array([0.0, 1e-300, 0.3, 1 - 2.0**-53])
    x = symmetric_beta(u[:, None], u[None, :], alpha)
    assert bool(((x >= 0) & (x <= 1)).all())
