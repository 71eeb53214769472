"""`bushpc predict | export`: a trained model on new images, and as a folder that stands alone."""

from __future__ import annotations

import sys
from pathlib import Path

from bushpc.cli.command import CONTINUE, FOLD, JSON, ROW, Arguments, Command, Group, option, run_folder
from bushpc.cli.show import print_json, warn


def predict(given: Arguments) -> int:
    from bushpc.evaluate.predict import CSV_FILE, Wanted, predict_files
    from bushpc.evaluate.predictor import load
    from bushpc.shards.progress import progress

    wanted = Wanted(
        prob=given.prob,
        uncertainty=given.uncertainty,
        overlay=given.overlay,
        prompts=given.prompts,
        pixel_mm=given.pixel_mm,
        batch_size=given.batch,
        grey_max=given.grey_max,
        formats=tuple(sorted(set(given.formats))),
    )
    predictor = load(
        given.model,
        fold=given.fold,
        row=given.row,
        device=given.device,
        tta=given.tta,
        postprocess=not given.no_postprocess,
        say=warn,
    )
    try:
        with progress("predict") as show:
            summary = predict_files(predictor, given.input, given.out, wanted, show)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    if given.json:
        rejected = [{"file": file, "reason": reason} for file, reason in summary.rejected]
        counts = {"predicted": summary.predicted, "done_before": summary.kept, "rejected": rejected}
        print_json({"csv": given.out / CSV_FILE, **counts})
        return 3 if summary.rejected else 0
    print(f"predicted: {summary.predicted}, done before: {summary.kept} file(s), rejected: {len(summary.rejected)}")
    print(f"written: {given.out / CSV_FILE}")
    return 3 if summary.rejected else 0


def test(given: Arguments) -> None:
    from bushpc.config import shards_folder
    from bushpc.evaluate.unseen import CSV_FILE, score_unseen
    from bushpc.shards.progress import progress

    with progress("test") as show:
        content = score_unseen(
            given.model,
            shards_folder(given.data),
            given.out,
            fold=given.fold,
            row=given.row,
            tta=given.tta,
            postprocess=not given.no_postprocess,
            device=given.device,
            show=show,
            say=warn,
        )
    if given.json:
        print_json({"csv": given.out / CSV_FILE, **content})
        return
    print(
        f"{len(content['members'])} model(s) on {content['images']} scans of {content['data']} "
        f"(original grid, tta {content['tta']}, post-processing: {content['postprocess']})"
    )
    for name, found in content["metrics"].items():
        low, high = found["ci95"] or (float("nan"), float("nan"))
        print(f"{name:<24} {found['mean']:.4f}   95 % interval {low:.4f} to {high:.4f}")
    print(f"written: {given.out / CSV_FILE}")


def export(given: Arguments) -> None:
    from bushpc.evaluate import export as exports
    from bushpc.evaluate import hub

    if given.push is not None:
        hub.check_push(given.push, given.licence)
    content = exports.export(
        given.run_dir,
        given.out,
        fold=given.fold,
        row=given.row,
        formats=given.format,
        licence=given.licence,
        to_share=given.push is not None,
        say=warn,
    )
    if given.json:
        pushed = hub.push(given.out, given.push) if given.push is not None else None
        print_json({"folder": given.out, "pushed": pushed, **content})
        return
    names = ", ".join(fold["name"] for fold in content["folds"])
    print(f"{given.out}: {names}; use it with `bushpc predict {given.out} INPUT OUT`, or bushpc.load in Python")
    if given.push is not None:
        address = hub.push(given.out, given.push)
        print(
            f"{address}: pushed (a new repository is private); use it with `bushpc predict hub:{given.push} INPUT OUT`"
        )


TTA = option(
    "--tta",
    nargs="?",
    const="mirror",
    metavar="HOW",
    help="none, mirror (also --tta alone: average with the mirrored image) or mirror_scale (also 0.75 "
    "and 1.25 times the size); default: as the model was evaluated",
)
NO_POSTPROCESS = option(
    "--no-postprocess",
    action="store_true",
    help="leave out the post-processing that `bushpc postprocess` chose for this model",
)
DEVICE = option("--device", default="auto", help="auto (default), cpu or cuda")


GROUP = Group(
    "Use",
    60,
    (
        Command(
            name="predict",
            summary="Segment and measure new images.",
            run=predict,
            example="bushpc predict runs/table4 scans/ out/ --row full --overlay",
            examples=("bushpc predict model/ scan.dcm out/ --as dicom-seg nifti",),
            options=(
                run_folder("model", help="run folder, exported folder, or hub:OWNER/NAME[@REVISION]"),
                option("input", type=Path, metavar="INPUT", help="an image (PNG, JPEG, TIFF, BMP, DICOM) or a folder"),
                option("out", type=Path, metavar="OUT", help="folder for masks and predictions.csv"),
                FOLD,
                ROW,
                TTA,
                NO_POSTPROCESS,
                option("--prob", action="store_true", help="also write probability maps"),
                option("--uncertainty", action="store_true", help="also write the SD over folds and samples as maps"),
                option("--overlay", action="store_true", help="also write the images with the masks' contours"),
                option(
                    "--as",
                    dest="formats",
                    nargs="+",
                    default=[],
                    choices=("coco", "dicom-seg", "nifti"),
                    metavar="FORMAT",
                    help="also write the masks as coco, dicom-seg or nifti",
                ),
                option(
                    "--prompts", type=Path, metavar="CSV", help="sentences or attributes of the images, by file name"
                ),
                option("--pixel-mm", type=float, metavar="MM", help="pixel edge, for images that don't state it"),
                option(
                    "--grey-max",
                    type=float,
                    metavar="N",
                    help="value of white in 16-bit and float pictures (default: by their tags, else their values)",
                ),
                DEVICE,
                option("--batch", type=int, metavar="N", help="images per forward pass"),
                JSON,
            ),
            notes=("Run the same command again to continue. Exit status 3: some images were rejected.",),
        ),
        Command(
            name="test",
            summary="Score a trained model, all folds as an ensemble, on a dataset that none of them saw.",
            run=test,
            example="bushpc test runs/table4 udiat out/ --row full --tta mirror",
            options=(
                run_folder("model", help="run folder or exported folder"),
                option("data", metavar="DATA", help="a packed dataset: its name, or its folder of shards"),
                option("out", type=Path, metavar="OUT", help="new folder for per_image.csv and test.json"),
                FOLD,
                ROW,
                TTA,
                NO_POSTPROCESS,
                DEVICE,
                JSON,
            ),
        ),
        Command(
            name="export",
            summary="Write a trained model as a folder that needs neither run, shards nor network.",
            after_interrupt=CONTINUE,
            run=export,
            example="bushpc export runs/table4 model/ --row full",
            options=(
                run_folder(),
                option("out", type=Path, metavar="OUT", help="folder to write"),
                FOLD,
                ROW,
                option(
                    "--format",
                    nargs="+",
                    default=[],
                    choices=("safetensors", "torch", "onnx"),
                    metavar="FORMAT",
                    help="also write torch (torch.export) or onnx; safetensors is always written",
                ),
                option("--licence", metavar="ID", help="licence of the model, such as cc-by-4.0, for its card"),
                option("--push", metavar="OWNER/NAME", help="also upload it to this repository of the Hub"),
                JSON,
            ),
        ),
    ),
)
