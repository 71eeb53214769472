"""Promises of the phantom: real speckle statistics, and images, masks and attributes that agree with each other."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from bushpc.errors import ConfigError
from bushpc.sample import LABELS
from bushpc.shards import sources
from bushpc.shards.card import PROJECT_SHARDS, Card
from bushpc.shards.sources import breast, phantom

CARD = Card.load(PROJECT_SHARDS / "phantom")


def parameters(**changes):
    return phantom.Parameters(**{**CARD.parameters, **changes})


def homogeneous(shape, echo_db=0.0, excess_db=0.0):
    zero = np.zeros(shape)
    return phantom.Anatomy(zero + echo_db, zero, zero + excess_db, zero.astype(np.uint8))


@pytest.fixture(scope="module")
def samples():
    """200 scans, 4 of them normal."""
    return list(sources.read("phantom", None, CARD.override({"count": 196, "normals": 4, "looks": 1})))


def test_speckle_is_rayleigh_distributed_in_homogeneous_tissue():
    """Fully developed speckle: mean over standard deviation is sqrt(pi / (4 - pi)) = 1.91."""
    settings = parameters(noise_db=-200.0)
    rng = np.random.default_rng(0)
    fields = [phantom.envelope(rng, homogeneous((160, 200)), settings) for _ in range(8)]
    ratio = np.mean(fields) / np.std(fields)
    assert ratio == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.02)
    # KS wants independent values: one in every resolution cell, widest far from the focus
    spaced = np.stack(fields)[:, ::8, ::16].ravel()
    assert stats.kstest(spaced, stats.rayleigh(scale=np.sqrt(0.5)).cdf).pvalue > 0.01


def test_more_looks_smooth_the_speckle_by_the_square_root():
    settings = parameters(noise_db=-200.0)
    rng = np.random.default_rng(0)
    looks = np.array([phantom.envelope(rng, homogeneous((160, 200)), settings) for _ in range(4)])
    one, four = looks[0].mean() / looks[0].std(), looks.mean(axis=0).mean() / looks.mean(axis=0).std()
    assert four / one == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("row", [128, 40, 220])
def test_a_point_is_seen_as_wide_as_the_beam_and_as_long_as_the_pulse(row):
    """Closed form: w(z) = w0 sqrt(1 + (λ dz / (π w0²))²) for a Gaussian beam; axially half the pulse's length."""
    settings = parameters(noise_db=-200.0, height=256, width=256, pixel_mm=0.1, focus=0.5, cycles=4.0)
    anatomy = homogeneous((256, 256), echo_db=-200.0)
    anatomy.specular_ZX[row, 128] = 1.0
    field = phantom.envelope(np.random.default_rng(0), anatomy, settings)
    wavelength = 1.54 / settings.frequency_mhz / 2  # there and back
    waist = 0.85 * 1.54 / settings.frequency_mhz * settings.f_number / np.sqrt(2)
    defocus = (row - 128) * 0.1
    waist_here = waist * np.sqrt(1 + (wavelength * defocus / (np.pi * waist**2)) ** 2)
    assert _full_width_mm(field[row], 0.1) == pytest.approx(2 * np.sqrt(np.log(2)) * waist_here, rel=0.03)
    assert _full_width_mm(field[:, 128], 0.1) == pytest.approx(4.0 * wavelength, rel=0.03)


def _full_width_mm(profile, pixel_mm):
    """Full width at half maximum, of a Gaussian with the profile's moments of intensity."""
    intensity = profile.astype(float) ** 2
    place = np.arange(len(profile)) * pixel_mm
    centre = (place * intensity).sum() / intensity.sum()
    sigma = np.sqrt(2 * ((place - centre) ** 2 * intensity).sum() / intensity.sum())  # of the amplitude
    return 2 * np.sqrt(2 * np.log(2)) * sigma


def test_echo_and_loss_shift_the_level_by_their_decibels():
    settings = parameters(noise_db=-200.0)
    level = {}
    for name, anatomy in {
        "plain": homogeneous((160, 200)),
        "echo": homogeneous((160, 200), echo_db=-12.0),
        "loss": homogeneous((160, 200), excess_db=7.0),
    }.items():
        level[name] = 20 * np.log10(phantom.envelope(np.random.default_rng(1), anatomy, settings).mean())
    assert level["echo"] - level["plain"] == pytest.approx(-12, abs=1e-3)
    assert level["loss"] - level["plain"] == pytest.approx(-7, abs=1e-3)


def test_noise_grows_with_depth_as_gain_makes_up_for_attenuation():
    """Over 32 mm at 6 MHz and 0.7 dB/cm/MHz, gain rises by 2 x 0.7 x 6 x 3.2 = 26.9 dB."""
    anatomy = homogeneous((160, 200), echo_db=-200.0)
    field = phantom.envelope(np.random.default_rng(0), anatomy, parameters(noise_db=-62.0))
    level = 20 * np.log10(np.sqrt((field**2).mean(axis=1)))
    slope = np.polyfit(np.arange(160), level, 1)[0]
    assert slope * 160 == pytest.approx(26.9, abs=1)
    assert level[:10].mean() == pytest.approx(-62, abs=1.5)


def test_a_scan_depends_on_seed_and_index_alone(samples):
    card = CARD.override({"count": 196, "normals": 4, "looks": 1})
    items = phantom.plan(None, card).items
    again = phantom.load(items[37])
    assert np.array_equal(again.image_HWC, samples[37].image_HWC)
    assert again.attributes == samples[37].attributes
    other = phantom.load(phantom.plan(None, card.override({"seed": 1})).items[37])
    assert not np.array_equal(other.image_HWC, samples[37].image_HWC)


def test_a_longer_dataset_begins_with_the_shorter_one():
    short = list(sources.read("phantom", None, CARD.override({"count": 5, "normals": 0})))
    long = list(sources.read("phantom", None, CARD.override({"count": 8, "normals": 0})))
    for one, other in zip(short, long, strict=False):
        assert one.key == other.key
        assert one.attributes == other.attributes
        assert np.array_equal(one.image_HWC, other.image_HWC)


def test_samples_are_what_the_vocabulary_says(samples):
    assert len(samples) == 200
    assert len({sample.key for sample in samples}) == 200
    for sample in samples:
        assert sample.image_HWC.shape == (160, 200, 3)
        assert sample.mask_HW.shape == (160, 200)
        assert sample.image_HWC.dtype == sample.mask_HW.dtype == np.uint8
        assert set(np.unique(sample.mask_HW)) <= {0, 1}
        assert sample.label in LABELS
        assert sample.mask_HW.any() == (sample.label != "normal")
        assert sample.pixel_mm == 0.2
        assert "" not in sample.attributes.values()


def test_the_metadata_have_breasts_columns(samples):
    for sample in samples:
        assert set(sample.attributes) == {column.lower() for column in breast.ATTRIBUTES}


def test_every_lesion_lies_whole_in_the_image_and_is_of_a_usual_size(samples):
    for sample in samples:
        mask = sample.mask_HW
        assert not mask[0].any()
        assert not mask[-1].any()
        assert not mask[:, 0].any()
        assert not mask[:, -1].any()
        if sample.label != "normal":
            assert 0.01 < mask.mean() < 0.25


def test_attributes_occur_about_as_often_as_in_breast(samples):
    lesions = [sample for sample in samples if sample.label != "normal"]
    patients = {sample.patient: sample for sample in lesions}.values()
    share = lambda test: np.mean([test(sample) for sample in patients])  # noqa: E731
    assert share(lambda s: s.label == "malignant") == pytest.approx(98 / 252, abs=0.1)
    assert share(lambda s: s.attributes["shape"] == "irregular") == pytest.approx(139 / 252, abs=0.12)
    assert share(lambda s: s.attributes["margin"] == "circumscribed") == pytest.approx(115 / 252, abs=0.12)
    assert share(lambda s: s.attributes["echogenicity"] == "hypoechoic") == pytest.approx(148 / 252, abs=0.12)


def test_malignant_lesions_look_malignant(samples):
    by_label = {
        label: [sample.attributes for sample in samples if sample.label == label] for label in ("benign", "malignant")
    }
    irregular = {label: np.mean([a["shape"] == "irregular" for a in found]) for label, found in by_label.items()}
    assert irregular["malignant"] > 0.8 > 0.6 > irregular["benign"]
    assert not {"2", "3"} & {a["birads"] for a in by_label["malignant"]}
    assert {a["birads"] for a in by_label["benign"]} <= {"2", "3", "4a", "4b", "4c", "5"}
    assert all(a["echogenicity"] != "anechoic" for a in by_label["malignant"])


def test_some_patients_are_scanned_twice_and_keep_their_attributes(samples):
    scans = Counter(sample.patient for sample in samples)
    assert set(scans.values()) == {1, 2}
    twice = [sample for sample in samples if scans[sample.patient] == 2]
    for first, second in zip(twice[::2], twice[1::2], strict=True):
        assert first.patient == second.patient
        assert first.label == second.label
        assert first.attributes == second.attributes
        assert not np.array_equal(first.image_HWC, second.image_HWC)


def test_round_is_rounder_than_oval_and_irregular_is_rougher_than_both():
    """Spread of an outline's radius: a circle has none, an ellipse some; a rough one deviates from its ellipse too."""
    rng = np.random.default_rng(0)
    spread = {
        shape: np.mean([_spread(phantom.draw_outline(rng, shape, "circumscribed", False)) for _ in range(50)])
        for shape in ("round", "oval", "irregular")
    }
    assert spread["round"] < 0.05 < spread["oval"]
    assert spread["round"] < spread["irregular"]
    rough = {
        shape: np.mean([_roughness(phantom.draw_outline(rng, shape, "circumscribed", False)) for _ in range(50)])
        for shape in ("round", "oval", "irregular")
    }
    assert rough["irregular"] > 2 * rough["oval"]
    assert rough["irregular"] > 2 * rough["round"]


@pytest.mark.parametrize("margin", ["angular", "microlobulated", "spiculated"])
def test_a_margin_that_is_not_circumscribed_roughens_the_outline(margin):
    smooth = [
        _detail(phantom.draw_outline(np.random.default_rng(i), "oval", "circumscribed", False)) for i in range(30)
    ]
    rough = [
        _detail(phantom.draw_outline(np.random.default_rng(i), "oval", f"not circumscribed - {margin}", False))
        for i in range(30)
    ]
    assert np.mean(rough) > 2 * np.mean(smooth)


def _spread(radius):
    return radius.std() / radius.mean()


def _roughness(radius):
    """Share of odd harmonics, which an ellipse about its centre has none of."""
    power = np.abs(np.fft.rfft(radius)) ** 2
    return np.sqrt(power[1::2].sum() / power[0])


def _detail(radius):
    """Share of harmonics from the seventh on."""
    power = np.abs(np.fft.rfft(radius)) ** 2
    return np.sqrt(power[7:].sum() / power[0])


def test_a_suspicious_irregular_lesion_is_taller_than_an_unsuspicious_one():
    def aspect(suspicious):
        outlines = [phantom.draw_outline(np.random.default_rng(i), "irregular", "", suspicious) for i in range(60)]
        angle = np.linspace(-np.pi, np.pi, 720, endpoint=False)
        return np.mean([np.ptp(r * np.cos(angle)) / np.ptp(r * np.sin(angle)) for r in outlines])

    assert aspect(True) < 1.0 < aspect(False)


def _contrast(sample):
    """Mean grey level inside the lesion, against a frame around it."""
    from scipy import ndimage

    inside = sample.mask_HW.astype(bool)
    frame = ndimage.binary_dilation(inside, iterations=14) & ~ndimage.binary_dilation(inside, iterations=6)
    grey = sample.image_HWC[..., 0].astype(float)
    return grey[inside].mean() - grey[frame].mean()


def test_echogenicity_is_what_it_is_called(samples):
    contrast = {}
    for sample in samples:
        if sample.label != "normal":
            contrast.setdefault(sample.attributes["echogenicity"], []).append(_contrast(sample))
    mean = {name: np.mean(values) for name, values in contrast.items()}
    assert mean["anechoic"] < mean["hypoechoic"] < mean["isoechoic"] < mean["hyperechoic"]
    assert mean["hypoechoic"] < -25
    assert mean["hyperechoic"] > 10
    assert np.mean([value < 0 for value in contrast["hypoechoic"]]) > 0.95


def test_a_grey_level_alone_does_not_find_the_lesion(samples):
    """Otherwise the phantom would teach nothing: the best threshold on the smoothed image stays far from the mask."""
    from scipy import ndimage

    lesions = [sample for sample in samples if sample.label != "normal"][:60]
    smooth = [ndimage.gaussian_filter(sample.image_HWC[..., 0].astype(float), 3) for sample in lesions]
    best = 0.0
    for threshold in range(20, 200, 10):
        dice = [
            2 * ((image < threshold) & (sample.mask_HW > 0)).sum() / ((image < threshold).sum() + sample.mask_HW.sum())
            for image, sample in zip(smooth, lesions, strict=True)
        ]
        best = max(best, float(np.mean(dice)))
    assert 0.3 < best < 0.8


@pytest.mark.parametrize(("feature", "sign"), [("shadowing", -1), ("enhancement", 1)])
def test_posterior_features_darken_or_brighten_what_lies_below(feature, sign):
    """The same scan with and without the feature, compared below the lesion and beside it."""
    settings = parameters(looks=1)
    shifts, beside = [], []
    for seed in range(8):
        clinical = {**phantom.draw_attributes(np.random.default_rng(seed), "benign"), "echogenicity": "hypoechoic"}
        images = []
        for posterior in ("no", feature):
            rng = np.random.default_rng(seed)
            anatomy = phantom.build_anatomy(
                rng, {**clinical, "posterior_features": posterior}, settings, with_lesion=True
            )
            images.append(20 * np.log10(phantom.envelope(rng, anatomy, settings)))
            mask = anatomy.mask_ZX.astype(bool)
        below = (np.cumsum(mask, axis=0) > 8) & ~mask
        clear = np.broadcast_to(~mask.any(axis=0), mask.shape).copy()
        clear[:, 15:-15] &= ~np.array([mask[:, max(0, x - 15) : x + 15].any() for x in range(15, 185)])
        shifts.append((images[1] - images[0])[below].mean())
        beside.append((images[1] - images[0])[clear].mean())
    assert np.mean(shifts) * sign > 4
    assert np.abs(np.mean(beside)) < 0.5


@pytest.mark.parametrize(
    "change", [{"height": 10}, {"count": 0, "normals": 0}, {"malignant_share": 1.5}, {"pixel_mm": 0}, {"looks": 0},
               {"count": 2.5}],
)  # fmt: skip
def test_impossible_parameters_are_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        parameters(**change)


def test_changed_parameters_are_another_source():
    plan, other = phantom.plan(None, CARD), phantom.plan(None, dataclasses.replace(CARD).override({"seed": 9}))
    assert plan.sources["parameters"] != other.sources["parameters"]
    assert plan.sources["generator"] == other.sources["generator"]
