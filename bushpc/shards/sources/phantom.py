"""Synthetic B-mode breast ultrasound: a source without a raw folder, for demos, tests and scaling runs.

    patient → clinical attributes → lesion outline → echo and attenuation maps → scatterers → beam → B-mode image

Speckle is not painted on. Complex Gaussian scatterers, weighted by the tissue's echo amplitude, are convolved
with a complex point-spread function; the image is the log-compressed envelope. The sampled attributes (shape,
margin, echogenicity, posterior features …) steer outline and tissue, so image, mask and metadata agree, and
the metadata have BrEaST's columns and vocabulary. How often each value occurs follows BrEaST's own statistics.

Every scan depends on (seed, index) alone: any number of processes, in any order, make the same bytes. Arrays
are (depth, width), suffix _ZX; depths and widths are in millimetres, tissue echo in dB against glandular tissue.
"""

from __future__ import annotations

import functools
import hashlib
import json
import typing as t
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import fft, ndimage, special

from bushpc.errors import ConfigError
from bushpc.files import sha256_of
from bushpc.sample import Sample
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

SOUND_MM_PER_US = 1.54  # speed of sound that every scanner assumes for soft tissue
INDEX_LIMIT = 10**6


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The scanner and the population; `shards/phantom/card.yaml` holds the values.

    count: scans with a lesion.
    normals: scans without one, besides.
    seed: of everything that is drawn.
    malignant_share: share of patients whose lesion is malignant.
    second_scan_every: every so many patients, one is scanned twice (so that grouping by patient matters); 0 never.
    height, width: image size in pixels.
    pixel_mm: edge of a pixel in millimetres.
    frequency_mhz: centre frequency of the pulse.
    cycles: length of the transmitted pulse in periods; sets the axial resolution.
    f_number: focal depth over aperture; sets the lateral resolution at the focus.
    looks: independent views whose envelopes are averaged (spatial compounding); 1 leaves speckle fully developed.
    focus: focal depth as a share of the image's depth.
    attenuation: of average tissue in dB per centimetre and MHz, one way; time-gain compensation undoes it.
    dynamic_range_db: echo range shown between black and white.
    noise_db: electronic noise at the transducer, against glandular tissue.
    """

    count: int
    normals: int
    seed: int
    malignant_share: float
    second_scan_every: int
    height: int
    width: int
    pixel_mm: float
    frequency_mhz: float
    cycles: float
    f_number: float
    looks: int
    focus: float
    attenuation: float
    dynamic_range_db: float
    noise_db: float

    def __post_init__(self) -> None:
        """Refuse what no scan can be made from. Raises: ConfigError."""
        for name in ("count", "normals", "seed", "second_scan_every", "height", "width", "looks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ConfigError(f"phantom {name}={getattr(self, name)}: a whole number from 0 on is needed.")
        for name in ("looks", "pixel_mm", "frequency_mhz", "cycles", "f_number", "attenuation", "dynamic_range_db"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"phantom {name}={getattr(self, name)}: a number above 0 is needed.")
        if min(self.height, self.width) < 64:
            raise ConfigError(f"phantom height={self.height} width={self.width}: at least 64 pixels each are needed.")
        if not 1 <= self.count + self.normals <= INDEX_LIMIT:
            raise ConfigError(
                f"phantom count={self.count} normals={self.normals}: 1 to {INDEX_LIMIT} scans can be made."
            )
        if not 0 <= self.malignant_share <= 1:
            raise ConfigError(f"phantom malignant_share={self.malignant_share}: a share between 0 and 1 is needed.")

    @property
    def wavelength_mm(self) -> float:
        return SOUND_MM_PER_US / self.frequency_mhz


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The recipe of one scan: its number, and the patient's number and label."""

    index: int
    patient: int
    label: str
    parameters: Parameters


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """List the scans that the card's parameters ask for. Raises: ConfigError for impossible parameters.

    The generator's own code counts as a source: a changed generator is another dataset.
    """
    if folder is not None:
        raise ConfigError(f"src={folder}: the phantom is synthetic and takes no src. Leave src out.")
    parameters = Parameters(**t.cast(dict[str, t.Any], card.parameters))
    text = json.dumps(card.parameters, sort_keys=True)
    sources = {
        "generator": sha256_of(Path(__file__)),
        "parameters": hashlib.sha256(text.encode()).hexdigest(),
    }
    items = []
    for index, patient in enumerate(_patients(parameters)):
        if index >= parameters.count:
            label = "normal"
        else:
            malignant = _rng(parameters.seed, "label", patient).random() < parameters.malignant_share
            label = "malignant" if malignant else "benign"
        scan = Scan(index=index, patient=patient, label=label, parameters=parameters)
        items.append(Item(key=f"phantom{index:06d}", label=label, recipe=scan))
    return Plan(items, sources)


def load(item: Item) -> Sample:
    """Make one scan."""
    scan: Scan = item.recipe
    parameters = scan.parameters
    clinical = draw_attributes(_rng(parameters.seed, "patient", scan.patient), scan.label)
    rng = _rng(parameters.seed, "scan", scan.index)
    anatomy = build_anatomy(rng, clinical, parameters, with_lesion=scan.label != "normal")
    image_ZX = scan_bmode(rng, anatomy, parameters)
    return Sample(
        key=item.key,
        patient=f"patient{scan.patient:06d}",
        label=scan.label,
        image_HWC=np.repeat(image_ZX[..., None], 3, axis=2),
        mask_HW=anatomy.mask_ZX,
        attributes=clinical,
        pixel_mm=parameters.pixel_mm,
    )


def _patients(parameters: Parameters) -> t.Iterator[int]:
    """The patient's number for every scan; the second of two scans directly follows the first."""
    patient = 0
    made = 0
    while True:
        twice = parameters.second_scan_every and patient % parameters.second_scan_every == 0
        for _ in range(2 if twice and made + 2 <= parameters.count else 1):
            if made == parameters.count + parameters.normals:
                return
            yield patient
            made += 1
        patient += 1


def _rng(seed: int, purpose: str, number: int) -> np.random.Generator:
    """An independent stream for every purpose and number, whatever the order they are asked for."""
    return np.random.default_rng([seed, int.from_bytes(purpose.encode(), "big"), number])


# --- the patient: clinical attributes -------------------------------------------------------------------------

_SHAPES = {
    "benign": {"irregular": 0.31, "oval": 0.60, "round": 0.09},
    "malignant": {"irregular": 0.94, "oval": 0.05, "round": 0.01},
}
_CIRCUMSCRIBED = {"oval": 0.91, "round": 0.80, "irregular": 0.10}  # BrEaST: margin follows shape, whatever the label
_MARGINS = {
    "benign": {"indistinct": 0.60, "microlobulated": 0.15, "angular": 0.05, "angular&indistinct": 0.10,
               "microlobulated&indistinct": 0.10},
    "malignant": {"indistinct": 0.29, "angular&indistinct": 0.21, "spiculated&indistinct": 0.13,
                  "microlobulated&indistinct": 0.13, "microlobulated": 0.08, "spiculated": 0.08, "angular": 0.08},
}  # fmt: skip
_ECHOGENICITY = {
    "benign": {"hypoechoic": 0.55, "heterogeneous": 0.20, "anechoic": 0.11, "complex cystic/solid": 0.05,
               "hyperechoic": 0.05, "isoechoic": 0.04},
    "malignant": {"hypoechoic": 0.77, "heterogeneous": 0.20, "complex cystic/solid": 0.03},
}  # fmt: skip
_POSTERIOR = {
    "benign": {"no": 0.70, "enhancement": 0.17, "shadowing": 0.12, "combined": 0.01},
    "malignant": {"no": 0.52, "shadowing": 0.33, "enhancement": 0.10, "combined": 0.05},
}
_BIRADS = {
    "benign": {"2": 0.19, "3": 0.25, "4a": 0.28, "4b": 0.19, "4c": 0.05, "5": 0.04},
    "malignant": {"4a": 0.01, "4b": 0.16, "4c": 0.42, "5": 0.41},
}
_DIAGNOSIS = {
    "benign": {"Fibroadenoma": 0.45, "Benign mammary dysplasia": 0.35, "Fibrosclerosis": 0.20},
    "malignant": {"Invasive carcinoma of no special type (NST)": 0.78, "Invasive lobular carcinoma": 0.16,
                  "Ductal carcinoma in situ (DCIS)": 0.06},
}  # fmt: skip
_TISSUE = {
    "heterogeneous: predominantly fat": 0.38,
    "heterogeneous: predominantly fibroglandular": 0.28,
    "homogeneous: fibroglandular": 0.22,
    "homogeneous: fat": 0.12,
}
_GLANDULAR_SHARE = {  # of the depth between skin and muscle
    "heterogeneous: predominantly fat": 0.45,
    "heterogeneous: predominantly fibroglandular": 0.65,
    "homogeneous: fibroglandular": 0.80,
    "homogeneous: fat": 0.20,
}


def draw_attributes(rng: np.random.Generator, label: str) -> dict[str, str | float | None]:
    """Clinical attributes of a patient, in the order a reader takes them: lesion, then assessment, then biopsy."""
    common: dict[str, str | float | None] = {
        "age": float(np.clip(rng.normal(62 if label == "malignant" else 49, 13), 18, 90).round()),
        "tissue_composition": _draw(rng, _TISSUE),
        "skin_thickening": _draw(rng, {"no": 0.94, "yes": 0.06}),
    }
    lesion_only = ("signs", "symptoms", "shape", "margin", "echogenicity", "posterior_features", "halo",
                   "calcifications", "interpretation", "verification", "diagnosis")  # fmt: skip
    if label == "normal":
        return {**common, "birads": "1", **dict.fromkeys(lesion_only)}
    malignant = label == "malignant"
    shape = _draw(rng, _SHAPES[label])
    circumscribed = rng.random() < _CIRCUMSCRIBED[shape]
    margin = "circumscribed" if circumscribed else f"not circumscribed - {_draw(rng, _MARGINS[label])}"
    echogenicity = _draw(rng, _ECHOGENICITY[label])
    # fluid lets the beam pass: simple cysts enhance and do not shadow
    posterior = {"enhancement": 0.75, "no": 0.25} if echogenicity == "anechoic" else _POSTERIOR[label]
    birads = _draw(rng, {"2": 0.8, "3": 0.2} if echogenicity == "anechoic" else _BIRADS[label])
    biopsied = birads not in ("2", "3")
    interpretation = "Suspicion of malignancy" if birads in ("4b", "4c", "5") else "Fibroadenoma"
    return {
        **common,
        "signs": _draw(rng, {"no": 0.7, "palpable": 0.3}),
        "symptoms": _draw(rng, {"no": 0.8, "family history of breast/ovarian cancer": 0.2}),
        "shape": shape,
        "margin": margin,
        "echogenicity": echogenicity,
        "posterior_features": _draw(rng, posterior),
        "halo": _draw(rng, {"yes": 0.46, "no": 0.54} if malignant else {"yes": 0.06, "no": 0.94}),
        "calcifications": _draw(rng, {"in a mass": 0.16, "no": 0.84} if malignant else {"in a mass": 0.05, "no": 0.95}),
        "birads": birads,
        "interpretation": "Simple cyst" if echogenicity == "anechoic" else interpretation,
        "verification": "confirmed by biopsy" if biopsied else "confirmed by follow-up care",
        "diagnosis": _draw(rng, _DIAGNOSIS[label]) if biopsied else None,
    }


def _draw(rng: np.random.Generator, shares: dict[str, float]) -> str:
    names = list(shares)
    weights = np.array(list(shares.values()))
    return names[int(rng.choice(len(names), p=weights / weights.sum()))]


# --- the anatomy: what reflects, and what attenuates ----------------------------------------------------------

_ANGLES = np.linspace(-np.pi, np.pi, 720, endpoint=False)


class Anatomy(t.NamedTuple):
    """What the scanner meets, by depth and width.

    echo_db_ZX: diffuse backscatter in dB.
    specular_ZX: amplitude of mirror-like interfaces, which reflect most where they lie flat.
    excess_db_ZX: two-way loss on the way to a point, in dB beyond that of average tissue.
    mask_ZX: uint8, 1 inside the lesion.
    """

    echo_db_ZX: np.ndarray
    specular_ZX: np.ndarray
    excess_db_ZX: np.ndarray
    mask_ZX: np.ndarray


def build_anatomy(
    rng: np.random.Generator, clinical: dict[str, str | float | None], parameters: Parameters, *, with_lesion: bool
) -> Anatomy:
    """Tissue layers with the lesion in them."""
    echo_ZX, specular_ZX, muscle_top_X = _tissue(rng, clinical, parameters)
    loss_ZX = np.zeros_like(echo_ZX)
    mask_ZX = np.zeros(echo_ZX.shape, np.uint8)
    if with_lesion:
        lesion = _place_lesion(rng, clinical, parameters, float(muscle_top_X.min()))
        echo_ZX, loss_ZX = _insert_lesion(rng, clinical, parameters, lesion, echo_ZX)
        specular_ZX = specular_ZX * (lesion.inside_mm_ZX < -0.5)
        if clinical["margin"] == "circumscribed":
            specular_ZX = specular_ZX + 0.8 * _interface(lesion.inside_mm_ZX)
        mask_ZX = (lesion.inside_mm_ZX >= 0).astype(np.uint8)
    excess_ZX = np.cumsum(loss_ZX, axis=0) * parameters.pixel_mm
    excess_ZX = ndimage.gaussian_filter1d(excess_ZX, 0.6 / parameters.pixel_mm, axis=1)  # a beam is not a line
    return Anatomy(echo_ZX, specular_ZX, excess_ZX, mask_ZX)


def _tissue(
    rng: np.random.Generator, clinical: dict[str, str | float | None], parameters: Parameters
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Skin, fat, glandular tissue, retromammary fat and muscle: echo map, interfaces, the muscle's depth in mm."""
    height_mm, scale = parameters.height * parameters.pixel_mm, 1 / parameters.pixel_mm

    def wave(size_mm: float) -> np.ndarray:
        return size_mm * _boundary(rng, parameters.width)

    depth_Z = (np.arange(parameters.height) + 0.5)[:, None] * parameters.pixel_mm

    def below(top_X: np.ndarray, edge_mm: float) -> np.ndarray:
        return _step((depth_Z - top_X) / edge_mm)

    skin_X = (2.6 if clinical["skin_thickening"] == "yes" else 1.5) + wave(0.15)
    muscle_X = height_mm * rng.uniform(0.80, 0.92) + wave(0.04 * height_mm)
    glandular = _GLANDULAR_SHARE[str(clinical["tissue_composition"])] * rng.uniform(0.85, 1.15)
    fat_share = (1 - glandular) * rng.uniform(0.6, 0.8)
    gland_top_X = skin_X + np.maximum(fat_share * (muscle_X - skin_X) + wave(0.07 * height_mm), 0.5)
    gland_bottom_X = np.minimum(muscle_X - 0.8, gland_top_X + glandular * (muscle_X - skin_X) + wave(0.05 * height_mm))

    lobules_ZX = _smooth_noise(rng, parameters, 1.6 * scale, 3.5 * scale)
    streaks_ZX = _smooth_noise(rng, parameters, 0.4 * scale, 3.0 * scale)
    patches_ZX = _smooth_noise(rng, parameters, 2.5 * scale, 4.0 * scale)
    fat_ZX = -13 + 2.0 * patches_ZX
    ducts_ZX = _step((lobules_ZX - 1.2) / 0.1)
    gland_ZX = 3.0 * streaks_ZX + 3.5 * patches_ZX - 7.0 * ducts_ZX
    muscle_ZX = -14 + 5.0 * streaks_ZX

    gland_weight_ZX = below(gland_top_X, 0.5) * (1 - below(gland_bottom_X, 0.4))
    echo_ZX = _blend(fat_ZX, gland_ZX, gland_weight_ZX)
    echo_ZX = _blend(echo_ZX, muscle_ZX, below(muscle_X, 0.15))
    echo_ZX = _blend(echo_ZX, np.full_like(echo_ZX, 3.0), 1 - below(skin_X, 0.1))
    ligaments_ZX = _interface(lobules_ZX) * (1 - 0.7 * gland_weight_ZX)  # Cooper's ligaments wrap the fat lobules
    fibres_ZX = _interface(streaks_ZX) * below(muscle_X, 0.15)
    specular_ZX = ligaments_ZX * below(skin_X, 0.1) + 0.8 * fibres_ZX
    specular_ZX += _interface(depth_Z - skin_X) + 1.5 * _interface(depth_Z - muscle_X)
    return echo_ZX, specular_ZX * np.exp(0.5 * patches_ZX), muscle_X


class Lesion(t.NamedTuple):
    """inside_mm_ZX: signed distance along the ray from the centre, positive inside. centre (z, x), radius_mm (mean)."""

    inside_mm_ZX: np.ndarray
    centre_mm: tuple[float, float]
    radius_mm: float


def _place_lesion(
    rng: np.random.Generator, clinical: dict[str, str | float | None], parameters: Parameters, floor_mm: float
) -> Lesion:
    """Draw outline, size and place; the lesion lies whole in the image, between skin and muscle."""
    height_mm, width_mm = parameters.height * parameters.pixel_mm, parameters.width * parameters.pixel_mm
    outline = draw_outline(rng, str(clinical["shape"]), str(clinical["margin"]), clinical["birads"] in ("4c", "5"))
    share = np.exp(rng.uniform(np.log(0.035), np.log(0.20)))  # of the image's area
    outline = outline * np.sqrt(share * height_mm * width_mm / (0.5 * np.mean(outline**2) * 2 * np.pi))
    top_mm = 2.8
    z, x = outline * np.sin(_ANGLES), outline * np.cos(_ANGLES)
    fit = min((floor_mm - top_mm - 0.5) / np.ptp(z), 0.92 * width_mm / np.ptp(x), 1.0)
    outline, z, x = outline * fit, z * fit, x * fit
    centre_z = rng.uniform(top_mm - z.min(), max(floor_mm - 0.5 - z.max(), top_mm - z.min()))
    centre_x = rng.uniform(0.04 * width_mm - x.min(), max(0.96 * width_mm - x.max(), 0.04 * width_mm - x.min()))
    depth_Z: np.ndarray = (np.arange(parameters.height) + 0.5)[:, None] * parameters.pixel_mm - centre_z
    across_X: np.ndarray = (np.arange(parameters.width) + 0.5)[None, :] * parameters.pixel_mm - centre_x
    edge_ZX = np.interp(np.arctan2(depth_Z, across_X), _ANGLES, outline, period=2 * np.pi)
    radius_mm = float(np.sqrt(np.mean(outline**2)))
    return Lesion(edge_ZX - np.hypot(depth_Z, across_X), (centre_z, centre_x), radius_mm)


def draw_outline(rng: np.random.Generator, shape: str, margin: str, suspicious: bool) -> np.ndarray:
    """Radius of the outline at 720 angles from -pi to pi, of mean about 1: the shape first, the margin upon it.

    Oval is wider than tall and smooth, round has equal axes, irregular has low harmonics besides. A margin adds
    corners (angular), small lobes (microlobulated) or spikes (spiculated); indistinct is a matter of echo, not
    of outline. Suspicious irregular lesions are taller than wide.
    """
    if shape == "round":
        aspect = rng.uniform(0.94, 1.06)
    elif shape == "oval":
        aspect = rng.uniform(1.4, 2.1)
    else:
        aspect = rng.uniform(0.75, 1.05) if suspicious else rng.uniform(1.0, 1.6)
    tilt = rng.normal(0, 0.15)
    angle = _ANGLES - tilt
    radius: np.ndarray = 1 / np.hypot(np.cos(angle) * aspect**-0.5, np.sin(angle) * aspect**0.5)
    if shape == "irregular":
        for harmonic, size in ((2, 0.09), (3, 0.11), (4, 0.07), (5, 0.05)):
            radius *= 1 + size * rng.uniform(0.6, 1.4) * np.cos(harmonic * _ANGLES + rng.uniform(0, 2 * np.pi))
    if "angular" in margin:
        corners = np.sort(rng.uniform(-np.pi, np.pi, rng.integers(5, 8)))
        radius *= np.interp(_ANGLES, corners, rng.uniform(0.82, 1.22, len(corners)), period=2 * np.pi)
    if "microlobulated" in margin:
        lobes = rng.integers(9, 14)
        radius *= 0.93 + 0.13 * np.abs(np.sin(lobes / 2 * _ANGLES + rng.uniform(0, np.pi)))
    if "spiculated" in margin:
        for at in rng.uniform(-np.pi, np.pi, rng.integers(8, 13)):
            away = np.abs((_ANGLES - at + np.pi) % (2 * np.pi) - np.pi)
            radius += rng.uniform(0.15, 0.4) * np.clip(1 - away / rng.uniform(0.08, 0.16), 0, 1)
    return radius


_LESION_ECHO_DB = {"hypoechoic": -25.0, "heterogeneous": -21.0, "anechoic": -60.0, "complex cystic/solid": -22.0,
                   "hyperechoic": 6.0, "isoechoic": -14.0}  # fmt: skip


def _insert_lesion(
    rng: np.random.Generator,
    clinical: dict[str, str | float | None],
    parameters: Parameters,
    lesion: Lesion,
    echo_ZX: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The echo map with the lesion in it, and its two-way excess loss in dB per millimetre of path."""
    margin, echogenicity = str(clinical["margin"]), str(clinical["echogenicity"])
    inside_ZX = lesion.inside_mm_ZX
    edge_mm = 0.55 if "indistinct" in margin else 0.12
    weight_ZX = _step(inside_ZX / edge_mm)
    scale = 1 / parameters.pixel_mm

    texture_ZX = _smooth_noise(rng, parameters, 1.2 * scale, 1.6 * scale)
    roughness = {"anechoic": 0.0, "heterogeneous": 4.5}.get(echogenicity, 1.5)
    level_ZX = _LESION_ECHO_DB[echogenicity] + rng.normal(0, 1.5) + roughness * texture_ZX
    if echogenicity == "complex cystic/solid":
        fluid_ZX = _smooth_noise(rng, parameters, 0.35 * lesion.radius_mm * scale, 0.35 * lesion.radius_mm * scale)
        level_ZX = np.where(fluid_ZX > 0.2, _LESION_ECHO_DB["anechoic"], level_ZX)
    if clinical["halo"] == "yes":  # an echogenic rim outside the lesion proper
        echo_ZX = echo_ZX + 7 * np.exp(-(((inside_ZX + 0.9) / 0.7) ** 2))
    echo_ZX = _blend(echo_ZX, level_ZX, weight_ZX)
    if clinical["calcifications"] == "in a mass":
        specks = np.argwhere(inside_ZX > 0.3 * lesion.radius_mm)
        chosen = specks[rng.choice(len(specks), min(len(specks), int(rng.integers(4, 10))), replace=False)]
        echo_ZX[chosen[:, 0], chosen[:, 1]] = 14.0

    across_X = (np.arange(parameters.width) + 0.5) * parameters.pixel_mm - lesion.centre_mm[1]
    path_mm = 1.6 * lesion.radius_mm  # typical way through the lesion: it shares out the whole effect
    shadow, enhancement = rng.uniform(12, 20) / path_mm, -rng.uniform(6, 10) / path_mm
    rate_X = {
        "no": np.zeros_like(across_X),
        "shadowing": np.full_like(across_X, shadow),
        "enhancement": np.full_like(across_X, enhancement),
        "combined": np.where(across_X < 0, shadow, enhancement),
    }[str(clinical["posterior_features"])]
    return echo_ZX, rate_X * weight_ZX


def _step(steps: np.ndarray) -> np.ndarray:
    """0 far below zero, 1 far above, smooth between."""
    return np.asarray(special.expit(steps))


def _interface(level_ZX: np.ndarray) -> np.ndarray:
    """The zero line of a map, a pixel wide: 1 where it lies across the beam, falling off as it tilts."""
    slope_z, slope_x = np.gradient(level_ZX)
    slope2 = slope_z**2 + slope_x**2 + 1e-18
    flatness = slope_z**2 / slope2
    return np.asarray(np.exp(level_ZX**2 / slope2 / -(0.6**2)) * flatness**2)


def _blend(base_ZX: np.ndarray, other_ZX: np.ndarray, weight_ZX: np.ndarray) -> np.ndarray:
    return np.asarray(base_ZX + weight_ZX * (other_ZX - base_ZX))


def _boundary(rng: np.random.Generator, width: int) -> np.ndarray:
    """A smooth random line across the image with values of about -1 to 1."""
    at = np.linspace(0, 1, width)
    line = np.zeros(width)
    for waves in (0.5, 1, 2, 3):
        line += rng.normal(0, 0.5 / max(waves, 1)) * np.cos(2 * np.pi * waves * at + rng.uniform(0, 2 * np.pi))
    return line


def _smooth_noise(rng: np.random.Generator, parameters: Parameters, sigma_z: float, sigma_x: float) -> np.ndarray:
    """A Gaussian random field with unit variance and the given correlation lengths in pixels."""
    white = rng.standard_normal((parameters.height, parameters.width))
    noise: np.ndarray = ndimage.gaussian_filter(white, (sigma_z, sigma_x), mode="wrap", truncate=3)
    return np.asarray(noise / noise.std())


# --- the scanner: from tissue to B-mode -----------------------------------------------------------------------


def scan_bmode(rng: np.random.Generator, anatomy: Anatomy, parameters: Parameters) -> np.ndarray:
    """B-mode image of an anatomy: uint8, (height, width); black to white spans the dynamic range."""
    looks = [envelope(rng, anatomy, parameters) for _ in range(parameters.looks)]
    level_db_ZX = 20 * np.log10(np.mean(looks, axis=0) + 1e-12)
    white_db = np.percentile(level_db_ZX, 99.7)  # the operator sets the gain so that little is saturated
    shown_ZX = 1 + (level_db_ZX - white_db) / parameters.dynamic_range_db
    return np.asarray(np.clip(shown_ZX * 255, 0, 255).round(), dtype=np.uint8)


def envelope(rng: np.random.Generator, anatomy: Anatomy, parameters: Parameters) -> np.ndarray:
    """Linear envelope of the received echo, (height, width); Rayleigh distributed where tissue is homogeneous.

    Scatterers are circular complex Gaussian, one per pixel, which stands for many unresolved ones after
    demodulation: with them the carrier drops out of the statistics, and the grid need resolve the envelope only.
    """
    height, width = anatomy.echo_db_ZX.shape
    pad = 16  # keeps the circular convolution from carrying the bottom to the top and the left to the right
    shape = (fft.next_fast_len(height + 2 * pad), fft.next_fast_len(width + 2 * pad))
    margins = ((pad, shape[0] - height - pad), (pad, shape[1] - width - pad))
    diffuse_ZX = np.pad(_amplitude(anatomy.echo_db_ZX), margins, mode="edge") * _complex_normal(rng, shape)
    reflectivity_ZX = diffuse_ZX + np.pad(anatomy.specular_ZX.astype(np.float32), margins, mode="edge")
    reflectivity_ZX *= np.pad(_amplitude(-anatomy.excess_db_ZX), margins, mode="edge")

    spectrum = fft.fft(reflectivity_ZX, axis=1) * _beam_spectrum(shape, pad, parameters)
    spectrum = fft.fft(spectrum, axis=0) * _pulse_spectrum(shape[0], parameters)[:, None]
    echo_ZX = fft.ifft2(spectrum)[pad : pad + height, pad : pad + width]

    depth_cm = np.arange(height)[:, None] * parameters.pixel_mm / 10
    gain_db = 2 * parameters.attenuation * parameters.frequency_mhz * depth_cm  # time-gain compensation
    noise_ZX = _complex_normal(rng, (height, width)) * _amplitude(parameters.noise_db + gain_db)
    return np.asarray(np.abs(echo_ZX + noise_ZX))


@functools.cache  # the same for every look of every scan
def _beam_spectrum(shape: tuple[int, int], pad: int, parameters: Parameters) -> np.ndarray:
    """Lateral spectrum of the pulse-echo beam at every depth: a focused Gaussian beam, unit energy.

    The product of the transmit and the receive Gaussian beam is a Gaussian beam again, with half the wavelength
    and 1/sqrt(2) of the waist. Away from the focus it only gains a Fresnel phase, which widens and curves it.
    """
    wavelength = parameters.wavelength_mm / 2
    waist = 0.85 * parameters.wavelength_mm * parameters.f_number / np.sqrt(2)  # 1/e of amplitude, one way 0.85 λ F
    frequency = fft.fftfreq(shape[1], parameters.pixel_mm)[None, :]
    depth = (np.arange(shape[0])[:, None] - pad) * parameters.pixel_mm
    defocus = depth - parameters.focus * parameters.height * parameters.pixel_mm
    amplitude: np.ndarray = np.exp(-((np.pi * waist * frequency) ** 2))
    amplitude /= np.sqrt(np.mean(amplitude**2))
    return np.asarray(amplitude * np.exp(-1j * np.pi * wavelength * defocus * frequency**2), dtype=np.complex64)


@functools.cache
def _pulse_spectrum(length: int, parameters: Parameters) -> np.ndarray:
    """Axial spectrum of the demodulated pulse: a Gaussian whose width at half maximum is `cycles` half wavelengths."""
    sigma = parameters.cycles * parameters.wavelength_mm / 2 / 2.355
    frequency = fft.fftfreq(length, parameters.pixel_mm)
    amplitude: np.ndarray = np.exp(-2 * (np.pi * sigma * frequency) ** 2)
    return np.asarray(amplitude / np.sqrt(np.mean(amplitude**2)), dtype=np.float32)


def _amplitude(level_db: np.ndarray) -> np.ndarray:
    """Single precision is far below the speckle, and halves the time."""
    return np.asarray(10 ** (level_db / 20), dtype=np.float32)


def _complex_normal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Circular complex Gaussian numbers of unit mean power."""
    parts = rng.standard_normal((*shape, 2), dtype=np.float32) * np.float32(np.sqrt(0.5))
    return parts.view(np.complex64)[..., 0]
