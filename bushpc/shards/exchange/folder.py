"""A cohort as a folder of images and masks.

images/a.png + masks/a.png | masks/a_mask.png | a.png + a_mask.png in one folder → scans

Which mask belongs to which image is found by their names, or the user gives a pattern such as `masks/{name}_seg*.png`.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

from bushpc.errors import DataError
from bushpc.shards import tree
from bushpc.shards.exchange.scans import Cohort, Found, LabelMap, Mask, MaskFiles, stem
from bushpc.shards.exchange.settings import ImportSettings
from bushpc.shards.exchange.tables import read_table

FORMATS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "original", "scans")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "segmentations", "segmentation", "annotations", "gt", "groundtruth")
# What a mask's name has more than its image's; a number may follow where an image has several.
_MARKS = r"[ _.-]*(mask|masks|seg|segmentation|tumor|tumour|lesion|label|gt|annotation|roi)s?[ _-]*\d*"
NAME = "{name}"


def find(folder: Path, settings: ImportSettings) -> Cohort:
    """The images below `folder`, each with its masks. Raises: DataError if there are no images."""
    every = pictures(folder)
    if not every:
        raise DataError(f"{folder} holds no pictures ({', '.join(FORMATS)}).")
    images_in = settings.images or _named(folder, IMAGE_FOLDERS)
    masks_in = settings.masks or (_named(folder, MASK_FOLDERS) if images_in else None)
    for word, part in (("images", images_in), ("masks", masks_in)):
        if part and NAME not in part and not (folder / part).is_dir():
            raise DataError(f"{word}={part}: {folder} has no such folder. It has: {_folders(folder)}.")
    images = [path for path in every if _below(path, images_in)]
    by_table = _masks_of_table(folder, settings, every)
    unused: list[str] = []
    if by_table is not None:
        masks = by_table
    elif masks_in and NAME in masks_in:
        masks, unused = _by_pattern(images, every, masks_in)
    else:
        candidates = [path for path in every if _below(path, masks_in)] if masks_in else every
        masks, unused = _by_name(images, candidates, images_in, masks_in)
    taken = {mask for found in masks.values() for mask in found}
    images = [image for image in images if image not in taken and not (masks_in and _is_mask(image, masks_in))]
    cohort = Cohort(scans=[])
    cohort.mask_classes = list(settings.classes) or ["lesion"]
    for image in images:
        name = stem(_relative(image, images_in))
        found = masks.get(image, ())
        looked_for = settings.mask or masks_in or "a mask whose name begins like the image's"
        cohort.scans.append(Found(name=name, image=image, mask=_mask(found, settings), looked_for=looked_for))
    for mask in unused:
        cohort.incomplete(f"{mask} is the mask of no image", settings)
    return cohort


def pictures(folder: Path) -> list[str]:
    """All pictures below a folder, relative to it and sorted. Raises: DataError for a folder that cannot be read."""
    paths = tree.glob(folder, "**/*")
    return [
        path.relative_to(folder).as_posix() for path in paths if path.suffix.lower() in FORMATS and not path.is_dir()
    ]


def _mask(files: tuple[str, ...] | list[str], settings: ImportSettings) -> Mask | None:
    if not files:
        return None
    if settings.classes:
        return LabelMap(files=tuple(files), levels=tuple((level,) for level in settings.classes.values()))
    return MaskFiles(files=tuple(files))


def _named(folder: Path, names: tuple[str, ...]) -> str | None:
    """The folder's child of one of these names, in any case."""
    children = {child.name.lower(): child.name for child in tree.listed(folder) if child.is_dir()}
    return next((children[name] for name in names if name in children), None)


def _folders(folder: Path) -> str:
    return ", ".join(child.name for child in tree.listed(folder) if child.is_dir()) or "no folders"


def _below(path: str, part: str | None) -> bool:
    return part is None or part in (".", "") or path.startswith(part.rstrip("/") + "/")


def _relative(path: str, part: str | None) -> str:
    return path.removeprefix(part.rstrip("/") + "/") if part else path


def _is_mask(path: str, masks_in: str) -> bool:
    """Whether a picture below the images' folder can only be a mask."""
    return fnmatch.fnmatchcase(path, masks_in.replace(NAME, "*")) if NAME in masks_in else _below(path, masks_in)


def _by_pattern(images: list[str], every: list[str], masks_in: str) -> tuple[dict[str, list[str]], list[str]]:
    """Masks by the user's pattern, in which {name} is the last part of the image's name, or all of it."""
    owners: dict[str, list[str]] = defaultdict(list)
    for image in images:
        for form in {PurePosixPath(stem(image)).name, stem(image)}:
            owners[form].append(image)
    before, _, after = masks_in.partition(NAME)
    ends = [_regex(before), _regex(after.replace(NAME, "*"))]
    patterns = [re.compile(name.join(ends)) for name in ("(.+)", "(.+?)")]  # `a_s1_s2` can be of a_s1 or of a
    masks: dict[str, list[str]] = defaultdict(list)
    unused: list[str] = []
    for path in every:
        matches = [match for pattern in patterns if (match := pattern.fullmatch(path))]
        found = next((owners[match[1]] for match in matches if match[1] in owners), [])
        found = [image for image in found if image != path]
        if len(found) > 1:
            raise DataError(f"{path} can be the mask of two images: {' and '.join(found[:2])}. Rename one.")
        if found:
            masks[found[0]].append(path)
        elif matches:
            unused.append(path)
    return dict(masks), unused


def _regex(pattern: str) -> str:
    """A file pattern as a regular expression without its end."""
    return fnmatch.translate(pattern).removesuffix(r"\Z")


def _by_name(
    images: list[str], candidates: list[str], images_in: str | None, masks_in: str | None
) -> tuple[dict[str, list[str]], list[str]]:
    """Masks that have the image's name, or that name and a mark such as `_mask`; in the same subfolder if there is one.

    Raises: DataError if a name is that of two images.
    """
    apart = masks_in is not None and masks_in != images_in
    by_name: dict[str, list[str]] = defaultdict(list)
    for image in images:
        by_name[PurePosixPath(stem(image)).name].append(image)
    masks: dict[str, list[str]] = defaultdict(list)
    unused, problems = [], []
    for mask in candidates:
        name = PurePosixPath(stem(mask)).name
        if apart and name in by_name:
            owners = by_name[name]
        else:
            base = re.sub(_MARKS + "$", "", name, flags=re.IGNORECASE)
            owners = by_name.get(base, []) if base != name else []
        owners = [image for image in owners if image != mask]
        if len(owners) > 1:
            place = str(PurePosixPath(_relative(mask, masks_in)).parent)
            near = [image for image in owners if str(PurePosixPath(_relative(image, images_in)).parent) == place]
            owners = near or owners
        if len(owners) > 1:
            problems.append(f"{mask} can be the mask of {' or '.join(owners[:3])}")
        elif owners:
            masks[owners[0]].append(mask)
        elif apart:
            unused.append(mask)
    if problems:
        raise DataError("two images have one name: " + "; ".join(problems[:5]) + ". Rename one of each.")
    return dict(masks), unused


def _masks_of_table(folder: Path, settings: ImportSettings, every: list[str]) -> dict[str, list[str]] | None:
    """Masks as a column of the table names them; several in a cell are separated by ; or &."""
    if not settings.mask or not settings.table:
        return None
    if not settings.image:
        raise DataError(
            f"mask={settings.mask} names a column of masks: also say which column names the images, image=."
        )
    names: dict[str, list[str]] = defaultdict(list)
    for path in every:
        for form in {path, PurePosixPath(path).name, stem(path), PurePosixPath(stem(path)).name}:
            names[form].append(path)
    table = read_table(folder, settings.table)
    masks: dict[str, list[str]] = {}
    problems = []
    for row in table.rows:
        image = names.get(row.cells.get(settings.image, "").replace("\\", "/"), [])
        cells = [cell.strip() for cell in re.split("[;&]", row.cells.get(settings.mask, "")) if cell.strip()]
        for cell in cells:
            found = names.get(cell.replace("\\", "/"), [])
            if settings.masks and len(found) > 1:
                found = [path for path in found if _below(path, settings.masks)]
            if len(found) != 1:
                problems.append(f"{table.name}, row {row.number}: {len(found)} files are the mask {cell}")
            elif len(image) >= 1:
                owner = next((path for path in image if _below(path, settings.images)), image[0])
                masks.setdefault(owner, []).append(found[0])
    if problems:
        raise DataError(f"{folder}:\n  " + "\n  ".join(problems[:20]))
    return masks
