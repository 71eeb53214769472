"""Licences of datasets → what they require of a model that was trained on them, and where its own licence contradicts.

    card.yaml's licence, a text ─requirements→ {non-commercial, …} ─conflicts→ sentences for the model card

Whether a trained model is an adaptation of its data is not settled, and differs by country. bushpc takes the careful
reading: what the data's licence requires of adaptations, the model's licence should keep.
"""

from __future__ import annotations

import re
import typing as t
from collections.abc import Iterable, Sequence
from pathlib import Path

from bushpc.errors import ConfigError, DataError, unknown_name
from bushpc.shards.card import PROJECT_SHARDS, Card

# The Hub's identifiers of licences that fit a model: https://huggingface.co/docs/hub/repositories-licenses
MODEL_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "openrail", "mpl-2.0", "lgpl-3.0"),
    *("gpl-3.0", "agpl-3.0", "eupl-1.1", "eupl-1.2", "etalab-2.0", "odc-by", "odbl", "pddl", "cdla-permissive-2.0"),
    *("cdla-sharing-1.0",),
)
STARTED_FROM = "weights that it started from"  # the role of what is no dataset
NO_LICENCE = "unknown"  # the Hub's identifier
_COMMON = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")

Requirement = t.Literal["non-commercial", "share-alike", "no-derivatives", "unclear"]
_WORDS: dict[Requirement, str] = {
    "non-commercial": r"\bby-nc|\bcc-nc|non-?commercial|research-(only|use|purpose)|for-(academic-)?research",
    "share-alike": r"\bby-(nc-)?sa|share-?alike|\ba?gpl|\bodbl|cdla-sharing",
    "no-derivatives": r"\bby-(nc-)?nd|no-?deriv",
    "unclear": r"none-stated|no-licen[cs]e|not-stated|unknown|see-there|as-stated-in|\bterms\b|check-yours|agreement",
}
_PERMISSIVE = (
    r"\bcc-?0|\b(cc|commons)-by|public-domain|\bmit\b|apache|\bbsd|\bisc\b|odc-by|\bpddl|unlicense|cdla-permissive|free-to-use|"
    r"etalab|openrail|\bmpl|\beupl|lgpl"
)


class DataLicence(t.NamedTuple):
    """A dataset that went into a model. role: how, in words that follow its title. where: its download page or ""."""

    data: str
    title: str
    licence: str
    where: str
    role: str


def requirements(licence: str) -> frozenset[Requirement]:
    """What a licence requires, read from its text; where the text names several licences, those of all of them.

    >>> sorted(requirements("CC BY-NC-SA 4.0"))
    ['non-commercial', 'share-alike']
    >>> sorted(requirements("Apache-2.0, like the generator"))
    []
    >>> sorted(requirements("ask Dr. Smith"))
    ['unclear']
    """
    text = re.sub(r"[\s_/]+", "-", licence.lower())
    text = re.sub(r"attribution-?", "by-", text) if "creative-commons" in text else text
    found = {name for name, words in _WORDS.items() if re.search(words, text)}
    if not found and not re.search(_PERMISSIVE, text):
        found.add("unclear")
    return frozenset(found)


def of_card(card: Card, role: str) -> list[DataLicence]:
    """The licences of a dataset: of a union, whose card refers to `data=NAME`, those of its parts."""
    parts = re.findall(r"\bdata=(\w+)", card.licence)
    if parts:
        return [each for part in parts for each in of_name(part, None, f"{role} as a part of {card.title}")]
    return [DataLicence(card.name, card.title, card.licence, card.where, role)]


def of_name(name: str, root: Path | None, role: str) -> list[DataLicence]:
    """The licences of a dataset by its name: from its card in the shards root, or the project's own."""
    try:
        return of_card(Card.find(name, (root or PROJECT_SHARDS) / name), role)
    except DataError:
        return [DataLicence(name, name, "not known here: its card is not among these shards", "", role)]


def conflicts(licence: str | None, data: Iterable[DataLicence]) -> list[str]:
    """One sentence for each dataset whose licence the model's contradicts. None as licence contradicts nothing yet."""
    if licence is None:
        return []
    found = []
    for each in data:
        if "no-derivatives" in requirements(each.licence):
            found.append(
                f"{each.title} ({each.licence}) allows no adaptations to be shared, whatever the model's licence: get "
                "the publisher's permission, or train without it"
            )
        elif _contradicts(licence, each):
            required = sorted(requirements(each.licence) - {"unclear"})
            found.append(
                f"{each.title} ({each.licence}) requires {' and '.join(required)}, which {licence} doesn't keep: "
                f"choose {' or '.join(fitting([each]))}, get the publisher's permission, or train without it"
            )
    return found


def _contradicts(licence: str, data: DataLicence) -> bool:
    required, kept = requirements(data.licence) - {"unclear"}, requirements(licence)
    # Share-alike means the same terms: no fewer restrictions, and no others.
    return "no-derivatives" in required or not required <= kept or ("share-alike" in required and kept != required)


def unclear(data: Iterable[DataLicence]) -> list[str]:
    """One sentence for each dataset whose licence doesn't say what it permits."""
    return [
        f"{each.title} ({each.licence}): read what it permits, and ask its publisher before sharing the model"
        for each in data
        if "unclear" in requirements(each.licence)
    ]


def fitting(data: Sequence[DataLicence]) -> list[str]:
    """Common licences that contradict none of the datasets', the most open ones; none if there is no such licence."""
    fits = [each for each in _COMMON if not any(_contradicts(each, one) for one in data)]
    fewest = min((len(requirements(each)) for each in fits), default=0)
    return [each for each in fits if len(requirements(each)) == fewest]


def checked(licence: str) -> str:
    """The identifier, in the Hub's spelling. Raises: ConfigError for one that the Hub doesn't know."""
    found = licence.lower().strip().replace(" ", "-")
    if found not in MODEL_LICENCES:
        raise ConfigError(unknown_name("licence", licence, MODEL_LICENCES))
    return found
