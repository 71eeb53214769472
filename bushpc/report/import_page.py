"""What `bushpc shards import` would pack → one HTML page with counts, problems and outlined pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bushpc.report.gallery import Note, Row, write_gallery
from bushpc.shards.exchange.take_in import Examined, Look

MOST_SCANS = 1000  # with pictures: all with problems first, then evenly spread
MOST_PROBLEMS = 200


def write_page(examined: Examined, folder: Path, command: Sequence[str]) -> Path:
    """Write `folder`/index.html. Raises: OSError."""
    shown = _shown(examined.looks)
    problems = examined.survey.problems
    more = [f"… and {len(problems) - MOST_PROBLEMS} more problems."] if len(problems) > MOST_PROBLEMS else []
    remarks = [
        "Dry run: nothing was packed." + (" The import will stop at these problems." if examined.problems else ""),
        *examined.card.notes,
    ]
    if len(shown) < len(examined.looks):
        remarks.append(f"{len(shown)} of {len(examined.looks)} scans are shown, spread evenly; all were checked.")
    patients = "not known" if examined.patients is None else str(examined.patients)
    figures = {"Scans": str(len(examined.looks)), "Patients": patients}
    figures |= {label.capitalize(): str(count) for label, count in examined.labels.items()}
    figures["Problems"] = str(len(examined.problems))
    return write_gallery(
        folder / "index.html",
        [_row(examined, look) for look in shown],
        title=f"Import of {examined.card.name}",
        kicker="Dry run",
        command=command,
        filters=["label", "patient"],
        classes=examined.card.mask_classes,
        figures=figures,
        remarks=remarks,
        problems=[*problems[:MOST_PROBLEMS], *more],
    )


def _shown(looks: list[Look]) -> list[Look]:
    bad = [look for look in looks if look.problem][:MOST_SCANS]
    good = [look for look in looks if not look.problem]
    room = MOST_SCANS - len(bad)
    step = max(1, -(-len(good) // room)) if room else 0
    return [*bad, *(good[::step] if step else [])]


def _row(examined: Examined, look: Look) -> Row:
    recipe = look.item.recipe
    fields = {
        "label": look.item.label,
        "patient": recipe.patient,
        "image": recipe.image,
        "mask": ", ".join(recipe.mask.files) if recipe.mask and recipe.mask.files else None,
        "size": f"{look.width} x {look.height}" if look.width else None,
        "lesion, % of image": round(100 * look.lesion_share, 1) if look.lesion_share else None,
        **recipe.attributes,
    }
    return Row(
        id=look.item.key,
        key=look.item.key,
        load=lambda: examined.load(look),
        fields=fields,
        notes=[Note(kind="Problem", text=look.problem, grave=True)] if look.problem else [],
    )
