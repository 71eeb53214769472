"""Promises of the one warp and the one table, against scipy, numpy, torchvision and nnU-Net's own transforms."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from bushpc.config import AugmentConfig, compose, config_names
from bushpc.data.augment import Augment, device, pixels, tables
from bushpc.data.augment.affine import about, shift
from bushpc.data.augment.change import Change, Window, noise_field
from bushpc.data.augment.scan import Scan
from bushpc.data.augment.source import source_of

EDGE = 96
MIDDLE = (EDGE - 1) / 2
TURN = about(MIDDLE, MIDDLE, 0.9, -0.3, 0.35, 1.05)
NODES = (np.random.default_rng(2).uniform(-1, 1, (2, 4, 4)) * 4).astype(np.float32)
POLICIES = [name for name in config_names("augment") if name not in ("none", "sam_multitask")]


def scan_and_mask(edge: int = EDGE) -> tuple[np.ndarray, np.ndarray]:
    """A smooth grey picture with all levels, and an off-centre ellipse in it."""
    y, x = np.mgrid[:edge, :edge] / edge
    mask = (((x - 0.4) / 0.2) ** 2 + ((y - 0.45) / 0.13) ** 2 < 1).astype(np.uint8)
    picture = 128 + 60 * np.sin(9 * x + 3 * y) + 50 * np.cos(7 * y) - 60 * mask
    noise = np.random.default_rng(0).normal(0, 12, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8), mask


def record(key: str = "a", label: str = "benign"):
    return SimpleNamespace(key=key, label=label)


def policy(name: str, *words: str) -> AugmentConfig:
    return compose(["model=unet_small", "data=phantom", "cluster=local", f"augment={name}", *words]).augment


def sampled(image: np.ndarray, x: np.ndarray, y: np.ndarray, order: int) -> np.ndarray:
    return ndimage.map_coordinates(image.astype(float), [y, x], order=order, mode="grid-constant")


# --- movement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        Change(source=TURN.inverse),
        Change(nodes_2NN=NODES),
        Change(fan=0.35),
        Change(source=TURN.inverse, nodes_2NN=NODES, fan=0.35),
    ],
)
def test_the_warp_is_bilinear_for_the_image_and_the_nearest_pixel_for_the_mask(change):
    image, mask = scan_and_mask()
    x, y = (each.numpy().astype(float) for each in source_of(change, EDGE))
    moved, moved_mask = pixels.apply(change, image, mask)
    assert np.abs(moved - sampled(image, x, y, 1)).max() <= 0.6
    nearest = sampled(mask, np.rint(x), np.rint(y), 0)
    assert (moved_mask != nearest).mean() < 2e-4  # ties


def test_one_warp_is_the_sequence_of_its_parts():
    """On pictures of a coordinate, which interpolation keeps exactly."""
    y, x = np.mgrid[:EDGE, :EDGE].astype(np.float32)
    elastic, fan, turn = Change(nodes_2NN=NODES), Change(fan=0.35), Change(source=TURN.inverse)
    whole = Change(source=TURN.inverse, nodes_2NN=NODES, fan=0.35)
    empty = np.zeros((EDGE, EDGE), np.uint8)
    inside = np.ones((EDGE, EDGE), bool)
    for coordinate in (x, y):
        one = pixels.moved(whole, coordinate, empty)[0]
        step, covered = coordinate, np.ones((EDGE, EDGE), np.uint8)
        for part in (turn, fan, elastic):  # the source is turned first
            step, covered = pixels.moved(part, step, covered)
        inside = ndimage.binary_erosion(covered > 0, iterations=4)
        # Elastic and fan bend the picture of a coordinate, so a second interpolation is off by its curvature.
        assert np.abs(one - step)[inside].max() < 0.1
    assert inside.mean() > 0.3


def test_flip_rotation_zoom_shear_and_shift_in_one_map_are_torchvisions_affine():
    image, _ = scan_and_mask()
    drawn = tv.affine(
        torch.from_numpy(image)[None].float(),
        20.0,
        [5, -3],
        1.1,
        [0.0, 0.0],
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    cos, sin = 1.1 * np.cos(np.radians(20)), 1.1 * np.sin(np.radians(20))
    ours = shift(5, -3).after(about(MIDDLE, MIDDLE, cos, -sin, sin, cos))
    moved, _ = pixels.apply(Change(source=ours.inverse), image, np.zeros_like(image))
    assert np.abs(moved - drawn[0].numpy()).max() <= 1


@pytest.mark.parametrize("name", POLICIES)
def test_a_lesion_drawn_into_the_image_stays_under_its_mask(name):
    """Movement alone: an image that is its own mask, so that any shift between the two shows."""
    _, mask = scan_and_mask(128)
    grey = {"brightness": 0.0, "contrast": 0.0, "gain": 0.0, "gamma": 0.0, "gamma_inverted": 0.0, "noise": 0.0}
    grey |= {"blur": 0.0, "lowres": 0.0, "speckle": 0.0, "shadow": 0.0, "time_gain": 0.0, "lateral_gain": 0.0}
    config = dataclasses.replace(policy(name), **grey, trivial=0.0, rotate=30.0, elastic=0.5)
    augment, apart = Augment(config), []
    for turn in range(40):
        image, moved = augment(*_tensors(mask * 200, mask), record(), 0, turn)
        centre = [ndimage.center_of_mass(each[0].numpy().astype(float)) for each in (image, moved)]
        apart.append(np.subtract(*centre))
        assert (((image[0] >= 100) != (moved[0] > 0)).float().mean()) < 0.002
    # A mask of whole pixels has a centre of mass that is a little off; half a pixel would be a wrong convention.
    assert np.abs(np.mean(apart, axis=0)).max() < 0.03
    assert np.abs(apart).max() < 0.4


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_moves_a_lesion_out_of_the_image(name):
    y, x = np.mgrid[:128, :128]
    mask = ((x - 20) ** 2 + (y - 100) ** 2 < 15**2).astype(np.uint8)  # near a corner, and inside
    config = dataclasses.replace(policy(name), keep_lesion=0.9)
    augment = Augment(config)
    image = np.repeat(scan_and_mask(128)[0][..., None], 3, axis=2)
    moved = 0
    for turn in range(200):
        change = augment.change(image, mask, record(), 0, turn)
        if change.source is not None:
            back = change.source.inverse
            px, py = back.a * x + back.b * y + back.c, back.d * x + back.e * y + back.f
            inside = (px > -0.5) & (px < 127.5) & (py > -0.5) & (py < 127.5)
            assert inside[mask > 0].mean() > 0.8  # 0.9 of the 32 points that are looked at
            moved += 1
        assert pixels.apply(change, image, mask)[1].any()
    assert moved > 20


def test_elastic_deformation_folds_nothing_and_leaves_the_edges():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        most = 0.4 * 128 / (5 + 3)
        nodes = rng.choice([-most, most], (2, 5, 5)).astype(np.float32)  # the worst case
        x, y = (each.numpy() for each in source_of(Change(nodes_2NN=nodes), 128))
        dxx, dxy, dyx, dyy = (
            np.diff(x, axis=1)[:-1],
            np.diff(x, axis=0)[:, :-1],
            np.diff(y, axis=1)[:-1],
            np.diff(y, axis=0)[:, :-1],
        )
        assert (dxx * dyy - dxy * dyx).min() > 0
        assert abs(x[:, 0]).max() < 0.5
        assert abs(y[-1] - 127).max() < 0.5


def test_the_fan_shows_the_whole_scan_between_straight_beams():
    """Beams are columns of the scan: straight lines, the outermost from the upper edge to the sides."""
    x, y = (each.numpy() for each in source_of(Change(fan=np.radians(20)), EDGE))
    assert abs(y[-1, (EDGE - 1) // 2 : EDGE // 2 + 1] - (EDGE - 1)).max() < 0.6  # the middle reaches the deepest row
    assert abs(y[0, EDGE // 2 - 1]) < 3  # a curved probe is highest in the middle
    last = int(np.argmax(x[:, 0] > -0.5))  # the outermost beam leaves the image here
    assert y[last, 0] > 0.9 * EDGE
    assert (x[last, 0], x[last, -1]) == pytest.approx((0, EDGE - 1), abs=1)
    rows = np.arange(EDGE // 2, EDGE)
    beam = [np.interp(20.0, x[row], np.arange(EDGE)) for row in rows]  # where column 20 lies in each row
    assert np.abs(np.diff(beam, n=2)).max() < 1e-2


# --- grey levels ------------------------------------------------------------------------------------------------


def _scan(image: np.ndarray) -> Scan:
    return Scan.of(image[..., None].repeat(3, axis=2), np.zeros_like(image))


def test_brightness_and_contrast_are_torchvisions():
    image, _ = scan_and_mask()
    rgb = torch.from_numpy(image)[None].repeat(3, 1, 1)
    levels = tables.brightness(tables.LEVELS, 1.15)
    assert np.abs(tables.rounded(levels)[image] - tv.adjust_brightness(rgb, 1.15)[0].numpy().astype(int)).max() <= 1
    levels = tables.contrast(tables.LEVELS, 0.8, _scan(image))
    assert np.abs(tables.rounded(levels)[image] - tv.adjust_contrast(rgb, 0.8)[0].numpy().astype(int)).max() <= 1


@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_is_nnunets(inverted):
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform

    image, _ = scan_and_mask()
    theirs = GammaTransform(
        gamma=(1.4, 1.4), p_invert_image=float(inverted), synchronize_channels=False, p_per_channel=1, p_retain_stats=1
    )
    expected = theirs(image=torch.from_numpy(image).float()[None].clone())["image"][0].numpy()
    levels = tables.gamma(tables.LEVELS, 1.4, _scan(image), inverted=inverted)
    if inverted:
        expected = _negated_back(expected)
    assert np.abs(levels[image] - expected).max() < 0.05


def _negated_back(expected: np.ndarray) -> np.ndarray:
    return expected if expected.mean() > 0 else -expected


def test_posterise_solarise_autocontrast_and_equalise_are_torchvisions():
    image, _ = scan_and_mask()
    image = (image // 2 + 30).astype(np.uint8)
    scan, there = _scan(image), torch.from_numpy(image)[None]
    assert np.array_equal(tables.rounded(tables.posterise(tables.LEVELS, 3))[image], tv.posterize(there, 3)[0])
    assert np.array_equal(tables.rounded(tables.solarise(tables.LEVELS, 90.0))[image], tv.solarize(there, 90.0)[0])
    ours = tables.rounded(tables.autocontrast(tables.LEVELS, scan))[image]
    assert np.abs(ours.astype(int) - tv.autocontrast(there)[0].numpy()).max() <= 1
    assert np.array_equal(tables.rounded(tables.equalise(tables.LEVELS, scan))[image], tv.equalize(there)[0])


def test_blur_low_resolution_sharpness_and_noise_are_scipys_nnunets_torchvisions_and_numpys():
    image, mask = scan_and_mask()
    there = torch.from_numpy(image).float()[None, None]
    blurred = pixels.filtered(Change(blur=(0.8, 1.3)), image.astype(np.float32))
    assert np.abs(blurred - ndimage.gaussian_filter(image.astype(float), (1.3, 0.8), mode="mirror")).max() < 0.02
    low = torch.nn.functional.interpolate(there, (67, 67), mode="nearest-exact")
    low = torch.nn.functional.interpolate(low, (EDGE, EDGE), mode="bicubic")  # as nnU-Net's transform
    assert np.abs(pixels.filtered(Change(lowres=67), image.astype(np.float32)) - low[0, 0].numpy()).max() < 0.02
    sharp = tv.adjust_sharpness(torch.from_numpy(image)[None], 1.7)[0].numpy().astype(int)
    assert np.abs(pixels.apply(Change(sharpness=1.7), image, mask)[0] - sharp).max() <= 1
    noise = noise_field(EDGE)[3 : 3 + EDGE, 5 : 5 + EDGE]
    noisy, _ = pixels.apply(Change(noise=Window(3, 5, 20.0)), image, mask)
    assert np.array_equal(noisy, np.rint(np.clip(image + 20 * noise, 0, 255)))
    assert abs(noise_field(EDGE).std() - 1) < 0.01


def test_nnunets_policy_has_the_probabilities_and_ranges_of_the_installed_nnunet():
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    transforms = nnUNetTrainer.get_training_transforms((128, 128), (-np.pi, np.pi), None, (0, 1), False).transforms
    spatial, mirror = transforms[0], next(each for each in transforms if type(each).__name__ == "MirrorTransform")
    ours = policy("nnunet")
    assert (ours.rotate, ours.rotate_p, ours.view, ours.elastic) == (180, spatial.p_rotation, spatial.p_scaling, 0)
    assert (ours.view_range, spatial.p_elastic_deform) == (tuple(spatial.scaling), 0)
    assert (ours.vflip, ours.hflip, tuple(mirror.allowed_axes)) == (0.5, 0.5, (0, 1))
    random = [
        (type(each.transform).__name__, each.apply_probability, each.transform)
        for each in transforms
        if hasattr(each, "apply_probability")
    ]
    names = {name: (p, inner) for name, p, inner in random if name != "GammaTransform"}
    p, noise = names["GaussianNoiseTransform"]
    assert (ours.noise, ours.noise_range) == (p, tuple(noise.noise_variance))
    p, blur = names["GaussianBlurTransform"]
    assert (ours.blur, ours.blur_range) == (p * blur.p_per_channel, tuple(blur.blur_sigma))
    p, bright = names["MultiplicativeBrightnessTransform"]
    assert (ours.gain, ours.gain_range) == (p, tuple(bright.multiplier_range.contrast_range))
    p, contrast = names["ContrastTransform"]
    assert (ours.contrast_p, 1 - ours.contrast, 1 + ours.contrast) == (p, *contrast.contrast_range.contrast_range)
    p, low = names["SimulateLowResolutionTransform"]
    assert (ours.lowres, ours.lowres_range) == (p * low.p_per_channel, tuple(low.scale))
    inverted, gamma = [(p, tuple(inner.gamma.contrast_range)) for name, p, inner in random if name == "GammaTransform"]
    assert (ours.gamma_inverted, ours.gamma_inverted_range) == inverted
    assert (ours.gamma, ours.gamma_range) == gamma


def test_speckle_gain_and_shadow_leave_the_black_around_a_fan_black():
    image, mask = scan_and_mask(128)
    image[:, :30] = 0
    augment = Augment(AugmentConfig(method="one_warp", speckle=1, time_gain=1, lateral_gain=1, shadow=1))
    for turn in range(10):
        changed, _ = augment(*_tensors(image, mask), record(), 0, turn)
        assert not changed[..., :30].any()
        assert (changed[0, :, 30:].numpy() != image[:, 30:]).mean() > 0.8


# --- workers and device -----------------------------------------------------------------------------------------


def _tensors(image: np.ndarray, mask: np.ndarray, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(image)[None].repeat(channels, 1, 1), torch.from_numpy(mask)[None]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("colour", [False, True])
def test_the_device_gives_what_the_workers_give_within_a_grey_level(name, colour):
    image, mask = scan_and_mask(128)
    image_SSC = np.repeat(image[..., None], 3, axis=2)
    if colour:
        image_SSC = image_SSC // np.array([1, 2, 3], np.uint8)
    turns = list(range(24))
    images, masks, records = [image_SSC] * 24, [mask] * 24, [record(str(turn)) for turn in turns]
    config = dataclasses.replace(policy(name), elastic=0.3, fan=0.2)
    made, made_masks, _ = Augment(config).batch(images, masks, records, 3, turns)
    later = Augment(dataclasses.replace(config, where="device"))
    untouched, untouched_masks, changes = later.batch(images, masks, records, 3, turns)
    assert torch.equal(untouched[0], torch.from_numpy(image_SSC).permute(2, 0, 1))
    there, there_masks = device.apply(changes, untouched, untouched_masks)
    assert (made.int() - there.int()).abs().max() <= 1
    assert (made_masks != there_masks).float().mean() < 2e-5  # ties of the nearest pixel
    assert (made != untouched).float().mean() > 0.3


def test_grey_scans_are_one_channel_in_memory_and_look_like_three():
    image, mask = scan_and_mask()
    images, _, _ = Augment(policy("light")).batch([np.repeat(image[..., None], 3, axis=2)], [mask], [record()], 0, [0])
    assert (images.shape, images.stride(1)) == ((1, 3, EDGE, EDGE), 0)
    assert images.untyped_storage().nbytes() == EDGE * EDGE


def test_every_class_of_a_mask_moves():
    image, mask = scan_and_mask()
    bits = mask | (np.roll(mask, 20, axis=1) << 1)
    _, planes, _ = Augment(policy("light")).batch([image[..., None]], [bits], [record()], 0, [3], 2)
    for number, plane in enumerate((mask, np.roll(mask, 20, axis=1))):
        _, alone, _ = Augment(policy("light")).batch([image[..., None]], [plane], [record()], 0, [3], 1)
        assert planes.shape[1] == 2
        # the draws depend on where the lesion is only if it would leave the image
        assert torch.equal(planes[0, number], alone[0, 0])


def test_the_pictures_of_a_policy_are_its_draws():
    from bushpc.data.augment import picture

    image, mask = scan_and_mask()
    image_HWC = np.repeat(image[..., None], 3, axis=2)
    drawn = picture.draws_of(image_HWC, mask | mask << 2, policy("light"), 3, 1)
    assert [(pair[0].shape, set(np.unique(pair[1]))) for pair in drawn] == [((EDGE, EDGE, 3), {0, 5})] * 3
    assert set(POLICIES) < set(picture.policies())
    assert all(len(sentence) > 20 for sentence in picture.policies().values())
