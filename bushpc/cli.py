"""The one command: `bushpc pack | cv | grid | status | report | …`. Words are Hydra-style key=value overrides."""

from __future__ import annotations

import argparse
import os
import sys
import time
import typing as t
from pathlib import Path

from bushpc.errors import BushpcError, ConfigError, DispatchError, unknown_name

if t.TYPE_CHECKING:
    from rich.console import Console

    from bushpc.dispatch.doctor import Check
    from bushpc.dispatch.status import RunStatus
    from bushpc.dispatch.submit import Submission
    from bushpc.shards.manifest import Manifest

WATCH_S = 1.0
WATCH_SLURM_S = 10.0
WATCH_RETRIES = 6
LINE_EVERY_S = 20.0
MOST_NAMES = 40
FILE_WIDTH = 160
LAUNCHER_ENDS_RANKS_S = 5.0


def main(argv: t.Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 ended incomplete, 2 an error to mend, 3 bad images."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no more words for a list once an option has come: `resume RUN --only failed cluster.mem_gb=128`.
    if rest and "overrides" in arguments and not any(word.startswith("-") for word in rest):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(arguments.run(arguments) or 0)
    except BushpcError as error:
        print(f"bushpc: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; jobs that were submitted go on (`bushpc status RUN`)", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bushpc", description=__doc__)
    # deepspeed gives it to every rank; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    pack = commands.add_parser("pack", help="raw dataset folder → shards: bushpc pack data=breast src=FOLDER")
    pack.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="data=, src=, out=, workers=, excerpt=true; for a synthetic dataset also its card's parameters",
    )
    pack.set_defaults(run=_pack)

    shards = commands.add_parser("shards", help="what datasets there are: bushpc shards list")
    actions = shards.add_subparsers(required=True, metavar="ACTION")
    listed = actions.add_parser("list", help="every dataset: what, licence, where to get it, and whether packed here")
    listed.add_argument("--json", action="store_true", help="for machines")
    listed.add_argument("--deep", action="store_true", help="hash every packed tar instead of looking at its size")
    listed.set_defaults(run=_shards_list)
    audited = actions.add_parser(
        "audit", help="duplicates, leaks, bad masks, balance: bushpc shards audit data=breast [data=bus_bra …]"
    )
    audited.add_argument(
        "words",
        nargs="+",
        metavar="KEY=VALUE",
        help="data= (a dataset, or a folder of shards; several are compared), out=, folds=frozen|published|grouped, "
        "least_correlation= (from which on two images are one picture; 0.85 lies between unrelated ones and copies)",
    )
    audited.set_defaults(run=_shards_audit)
    drawn = actions.add_parser(
        "folds", help="folds in which near duplicates stay together: bushpc shards folds data=busi duplicates=group"
    )
    drawn.add_argument(
        "words", nargs="+", metavar="KEY=VALUE", help="data= (a dataset, or a folder of shards), duplicates=group"
    )
    drawn.set_defaults(run=_shards_folds)

    cv = commands.add_parser("cv", help="cross-validate: bushpc cv model=xbusnet data=breast cluster=local")
    cv.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    cv.add_argument("--wait", action="store_true", help="follow the cells and print the fold table at the end")
    cv.set_defaults(run=_cv)

    grid = commands.add_parser(
        "grid",
        help="an ablation, every row over all folds: bushpc grid grid=xbusnet_components cluster=slurm",
    )
    grid.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    grid.add_argument("--list", action="store_true", help="check and show the rows, submit nothing")
    grid.add_argument("--wait", action="store_true", help="follow the cells until they end, and the report is there")
    grid.set_defaults(run=_grid)

    train = commands.add_parser(
        "train",
        help="one cell, here, as a rank of torchrun, accelerate, deepspeed or srun: bushpc train model=xbusnet fold=0",
    )
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    train.add_argument(
        "--run-file", type=Path, metavar="FILE", help="write the run folder's path there, for a batch script"
    )
    train.set_defaults(run=_train)

    status = commands.add_parser("status", help="state of every cell: bushpc status RUN")
    status.add_argument("run_dir", type=Path, metavar="RUN")
    status.add_argument("--watch", action="store_true", help="keep the table on the screen until every cell ended")
    status.add_argument("--json", action="store_true", help="for machines")
    status.add_argument("--all", action="store_true", help="list every cell of a large run, too")
    status.set_defaults(run=_status)

    resume = commands.add_parser("resume", help="submit what is missing of any run: bushpc resume RUN")
    resume.add_argument("run_dir", type=Path, metavar="RUN")
    resume.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="cluster=, cluster.*, loader.*")
    resume.add_argument("--only", metavar="STATE", help="just the cells that are failed, stopped, stale or missing")
    resume.set_defaults(run=_resume)

    retry = commands.add_parser("retry", help="submit some cells again: bushpc retry RUN CELL…")
    retry.add_argument("run_dir", type=Path, metavar="RUN")
    retry.add_argument("cells", nargs="+", metavar="CELL", help="a cell, or a row of a grid for all its folds")
    retry.add_argument("--fresh", action="store_true", help="from step 0; what is there is kept in RUN/replaced")
    retry.set_defaults(run=_retry)

    cancel = commands.add_parser("cancel", help="end a run's jobs, or those of some cells: bushpc cancel RUN [CELL…]")
    cancel.add_argument("run_dir", type=Path, metavar="RUN")
    cancel.add_argument("cells", nargs="*", metavar="CELL", help="a cell, or a row of a grid for all its folds")
    cancel.set_defaults(run=_cancel)

    audit = commands.add_parser(
        "audit", help="prove that every sample was seen exactly once an epoch, whatever happened: bushpc audit RUN"
    )
    audit.add_argument("run_dir", type=Path, metavar="RUN")
    audit.add_argument("--json", action="store_true", help="for machines")
    audit.set_defaults(run=_audit)

    report = commands.add_parser("report", help="tables, figures and page: bushpc report RUN")
    report.add_argument("run_dir", type=Path, metavar="RUN")
    report.set_defaults(run=_report)

    compare = commands.add_parser(
        "compare", help="the same across runs on the same data and folds: bushpc compare RUN RUN…"
    )
    compare.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN")
    compare.add_argument("--out", type=Path, metavar="FOLDER", help="default: compare-<names> beside the first run")
    compare.set_defaults(run=_compare)

    doctor = commands.add_parser("doctor", help="will it work here? bushpc doctor model=xbusnet cluster=slurm")
    doctor.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    doctor.add_argument("--json", action="store_true", help="for machines")
    doctor.add_argument("--slurm", action="store_true", help="submit a probe job that finds out how jobs end here")
    doctor.add_argument("--time-limit", action="store_true", help="with --slurm: run into a time limit too (3 minutes)")
    doctor.add_argument(
        "--preempt-with",
        metavar="OPTIONS",
        help="with --slurm: sbatch options of a job that may preempt the probe, e.g. '--partition=high --exclusive'",
    )
    doctor.add_argument("--write", metavar="NAME", help="with --slurm: write configs/cluster/NAME.yaml")
    doctor.add_argument("--force", action="store_true", help="with --write: overwrite it")
    doctor.set_defaults(run=_doctor)

    drill = commands.add_parser(
        "drill", help="does a run survive here? Disturbs a short one: bushpc drill model=xbusnet cluster=slurm"
    )
    drill.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    drill.add_argument("--json", action="store_true", help="for machines")
    drill.add_argument(
        "--preempt-with",
        metavar="OPTIONS",
        help="also have it preempted, by a job with these sbatch options, e.g. '--partition=high --exclusive'",
    )
    drill.set_defaults(run=_drill)

    predict = commands.add_parser("predict", help="masks and measures of new images: bushpc predict RUN INPUT OUT")
    predict.add_argument("model", type=Path, metavar="RUN", help="run folder, or folder that `bushpc export` wrote")
    predict.add_argument("input", type=Path, metavar="INPUT", help="image (PNG, JPEG, TIFF, BMP, DICOM), or folder")
    predict.add_argument("out", type=Path, metavar="OUT", help="folder for masks and predictions.csv")
    _choose_model(predict)
    predict.add_argument("--tta", action="store_true", help="average with the prediction of the mirrored image")
    predict.add_argument("--prob", action="store_true", help="write probability maps too")
    predict.add_argument("--uncertainty", action="store_true", help="write the deviation over folds and samples too")
    predict.add_argument("--overlay", action="store_true", help="write the images with the masks' contours too")
    predict.add_argument("--prompts", type=Path, metavar="CSV", help="sentences or attributes of images, by file name")
    predict.add_argument("--pixel-mm", type=float, metavar="MM", help="edge of a pixel, where nothing else says it")
    predict.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    predict.add_argument("--batch", type=int, metavar="N", help="images per forward pass")
    predict.set_defaults(run=_predict)

    export = commands.add_parser(
        "export", help="the trained model as a folder that needs nothing else: bushpc export RUN OUT"
    )
    export.add_argument("run_dir", type=Path, metavar="RUN")
    export.add_argument("out", type=Path, metavar="OUT")
    _choose_model(export)
    export.add_argument(
        "--format",
        nargs="+",
        default=[],
        choices=("safetensors", "torch", "onnx"),
        metavar="FORMAT",
        help="besides safetensors, which is always there: torch (torch.export), onnx",
    )
    export.set_defaults(run=_export)

    generate = commands.add_parser(
        "generate",
        help="synthetic scans with masks and labels, as shards, on any number of ranks: "
        "bushpc generate RUN out=FOLDER n=500",
    )
    generate.add_argument("run_dir", type=Path, metavar="RUN", help="run folder of a trained generator")
    generate.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="out=, n=, seed=, fold=, row=, adapter=RUN (of the same base), adapter_fold=, adapter_row=, and all of "
        "configs/generate.yaml",
    )
    generate.add_argument(
        "--check", action="store_true", help="only check run, words and folder; nothing is made or written"
    )
    generate.set_defaults(run=_generate)

    quality = commands.add_parser(
        "quality",
        help="what synthetic scans are worth beside real ones: bushpc quality FOLDER against=breast",
    )
    quality.add_argument("synthetic", type=Path, metavar="FOLDER", help="what `bushpc generate` wrote")
    quality.add_argument(
        "words",
        nargs="+",
        metavar="KEY=VALUE",
        help="against= (real dataset, or a folder of its shards), fold= (that the generator was trained in, whose "
        "validation part is held out; known where FOLDER says it), folds=frozen|published|grouped, or part=all (of a "
        "dataset that it was not trained on), features=inception|RUN|none, segmenter=RUN, weights_dir=, device=, out=",
    )
    quality.set_defaults(run=_quality)

    weights = commands.add_parser("weights", help="stage pretrained weights: bushpc weights pull model=xbusnet")
    weights.add_argument("action", choices=("pull", "check"))
    weights.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="features=inception: those of FID and KID")
    weights.set_defaults(run=_weights)
    return parser


def _choose_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fold", type=int, metavar="K", help="one fold; the default is all of them, as an ensemble")
    parser.add_argument("--row", metavar="NAME", help="row of a grid")


def _pack(arguments: argparse.Namespace) -> None:
    from bushpc.config import ROOT, config_names
    from bushpc.shards.progress import progress
    from bushpc.shards.split import ensure_folds
    from bushpc.shards.write import pack

    given = _words(arguments.words)
    name = given.pop("data", "")
    if name not in config_names("data"):
        raise ConfigError(
            unknown_name("data", name, config_names("data"), "Example: bushpc pack data=breast src=FOLDER")
        )
    out = Path(given.pop("out", ROOT / "shards" / name))
    src = Path(given.pop("src")).expanduser() if "src" in given else None
    excerpt = given.pop("excerpt", "false")
    if excerpt not in ("true", "false"):
        raise ConfigError(f"excerpt={excerpt}: allowed is true or false")
    workers = _number("workers", given.pop("workers", str(len(os.sched_getaffinity(0)))))
    if not isinstance(workers, int):
        raise ConfigError(f"workers={workers}: a whole number is needed")
    parameters = {key: _number(key, value) for key, value in given.items()}
    with progress(f"pack {name}") as show:
        manifest = pack(
            name, src, out, excerpt=excerpt == "true", workers=workers, progress=show, parameters=parameters
        )
    if not manifest.synthetic:
        ensure_folds(out, manifest)
    _say_packed(out, manifest)


def _say_packed(out: Path, manifest: Manifest) -> None:
    labels = [record.label for record in manifest.records]
    counts = ", ".join(f"{labels.count(label)} {label}" for label in dict.fromkeys(labels))
    shards = f"{len(manifest.shards)} shards, manifest {manifest.hash[:12]}"
    print(f"{out}: {len(manifest.records)} scans ({counts}) in {shards}")


def _shards_list(arguments: argparse.Namespace) -> int:
    """Exit status 1 if a packed set is damaged."""
    from bushpc.shards.listing import list_datasets, listing_table, plain_lines, to_json

    console = _wide_console()
    entries = list_datasets(deep=arguments.deep)
    if arguments.json:
        print(to_json(entries))
    elif console.is_terminal:
        console.print(listing_table(entries))
    else:
        print("\n".join(plain_lines(entry) for entry in entries))
    return 1 if any(entry.packed == "damaged" for entry in entries) else 0


def _shards_audit(arguments: argparse.Namespace) -> int:
    """Exit status 1 if something grave was found."""
    from bushpc.config import ROOT, shards_folder
    from bushpc.report.audit_page import write_page
    from bushpc.shards.audit import audit, summary, write
    from bushpc.shards.duplicates import LEAST_CORRELATION
    from bushpc.shards.progress import progress

    folders = [shards_folder(word[5:]) for word in arguments.words if word.startswith("data=")]
    given = _words([word for word in arguments.words if not word.startswith("data=")])
    names = "-".join(folder.name for folder in folders)
    out = Path(given.pop("out", ROOT / "runs" / f"audit-{names}")).expanduser()
    folds = given.pop("folds", "frozen")
    correlation = _number("least_correlation", given.pop("least_correlation", str(LEAST_CORRELATION)))
    if given or not folders:
        wrong, words = next(iter(given), ""), ("data", "out", "folds", "least_correlation")
        raise ConfigError(unknown_name("word", wrong, words, "Example: bushpc shards audit data=breast"))
    with progress(f"audit {names}") as show:
        found = audit(folders, folds=folds, least_correlation=correlation, progress=show)
    write(found, out)
    page = write_page(found, out, ["bushpc", "shards", "audit", *arguments.words])
    _wide_console().print(summary(found))
    print(f"page: {page}")
    return 1 if found.grave else 0


def _shards_folds(arguments: argparse.Namespace) -> None:
    """Draw folds with seed 0 in which patients who share a picture count as one."""
    from bushpc.config import shards_folder
    from bushpc.shards.audit import find_duplicates
    from bushpc.shards.duplicates import tie_patients
    from bushpc.shards.manifest import Manifest
    from bushpc.shards.progress import progress
    from bushpc.shards.split import FILE_BY_SOURCE, freeze_folds, make_folds, refuse_synthetic

    given = _words(arguments.words)
    folder = shards_folder(given.pop("data", ""))
    if given != {"duplicates": "group"}:
        raise ConfigError(f"{' '.join(arguments.words)}: write bushpc shards folds data=… duplicates=group")
    manifest = Manifest.load(folder)
    refuse_synthetic(manifest, folder)
    with progress(f"compare {manifest.dataset}") as show:
        pairs = find_duplicates(folder, manifest, show)
    tied = tie_patients(manifest.records, pairs)
    path = folder / FILE_BY_SOURCE["grouped"]
    freeze_folds(path, manifest.records, make_folds(tied))
    patients, groups = ({record.patient for record in records} for records in (manifest.records, tied))
    print(f"{path}: {len(pairs)} pairs are one picture, so {len(patients)} patients count as {len(groups)}")
    print("train on them with folds=grouped")


def _cv(arguments: argparse.Namespace) -> int:
    from bushpc.config import compose
    from bushpc.dispatch.grid import cv_plan
    from bushpc.dispatch.submit import submit

    plan = cv_plan(compose(arguments.overrides))
    result = submit(plan, ["bushpc", "cv", *arguments.overrides])
    return _say_submission(result, plan.wanted if arguments.wait else None)


def _grid(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from bushpc.dispatch.grid import grid_plan, plan_table
    from bushpc.dispatch.submit import submit

    plan = grid_plan(arguments.overrides)
    if arguments.list:
        Console().print(plan_table(plan))
        return 0
    result = submit(plan, ["bushpc", "grid", *arguments.overrides])
    return _say_submission(result, plan.wanted if arguments.wait else None)


def _resume(arguments: argparse.Namespace) -> int:
    from bushpc.dispatch.control import resume

    words = [*(["--only", arguments.only] if arguments.only else []), *arguments.overrides]
    command = ["bushpc", "resume", str(arguments.run_dir), *words]
    return _say_submission(resume(arguments.run_dir, command, only=arguments.only, overrides=arguments.overrides))


def _retry(arguments: argparse.Namespace) -> int:
    from bushpc.dispatch.control import retry

    command = ["bushpc", "retry", str(arguments.run_dir), *arguments.cells, *(["--fresh"] if arguments.fresh else [])]
    return _say_submission(retry(arguments.run_dir, arguments.cells, command, fresh=arguments.fresh))


def _cancel(arguments: argparse.Namespace) -> None:
    from bushpc.dispatch.control import cancel

    found = cancel(arguments.run_dir, arguments.cells)
    print(f"cancelled: {_some(found.cells) or 'nothing was running or queued'}")
    if found.left:
        left = _some([f"{cell} ({run})" for cell, run in found.left.items()])
        print(f"left, as they belong to another run: {left}")


def _say_submission(result: Submission, wait_for: t.Sequence[str] | None = None) -> int:
    """What a submission did; then, if asked, follow these cells to their end."""
    for verb, names in (
        ("submitted", result.submitted),
        ("already running", result.live),
        ("already done", result.done),
        ("trained once, for another run, too", [f"{cell} ({run})" for cell, run in result.elsewhere.items()]),
    ):
        if names:
            print(f"{verb}: {_some(names)}")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"run: {result.run_dir}\nstatus: bushpc status {result.run_dir}")
    if wait_for is None:
        return 0
    status = _watch(result.run_dir, until_report=True)
    return _finish(result.run_dir, status, wait_for)


def _some(names: t.Sequence[str]) -> str:
    """Names for a line of the terminal: all of them, unless they are hundreds."""
    if len(names) <= MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[: MOST_NAMES // 2])} … and {len(names) - MOST_NAMES // 2} more"


def _train(arguments: argparse.Namespace) -> int:
    from bushpc.dispatch.direct import train_here

    return train_here(arguments.overrides, arguments.run_file)


def _status(arguments: argparse.Namespace) -> int:
    from bushpc.dispatch.status import read_status, status_table

    if arguments.watch and arguments.json:
        raise ConfigError("--watch with --json: --json tells the state once, --watch follows it for people. Choose one")
    if arguments.watch:
        status = _watch(arguments.run_dir, until_report=False)
    else:
        status = read_status(arguments.run_dir)
        if arguments.json:
            print(status.to_json())
        else:
            console = _wide_console()
            console.print(status_table(status, console.width, arguments.all))
    return 0 if status.complete or any(cell.live for cell in status.cells) else 1


def _audit(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from bushpc.dispatch.audit import audit_run, audit_table

    audit = audit_run(arguments.run_dir)
    if arguments.json:
        print(audit.to_json())
    else:
        Console().print(audit_table(audit))
    return 0 if audit.ok else 1


def _report(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from bushpc.report.page import build_report

    result = build_report(arguments.run_dir)
    Console().print(result.fold_table)
    print(f"report: {result.html}")


def _compare(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from bushpc.report import build_comparison

    result = build_comparison(arguments.run_dirs, arguments.out)
    Console().print(result.fold_table)
    print(f"report: {result.html}")


def _quality(arguments: argparse.Namespace) -> int:
    """Exit status 1 if generated images are training images."""
    from bushpc.config import ROOT, shards_folder
    from bushpc.generate.quality import Asked, judge, write
    from bushpc.generate.quality_page import make_tables, write_page
    from bushpc.report.tables import to_rich
    from bushpc.shards.progress import progress

    given = _words(arguments.words)
    against = shards_folder(given.pop("against", ""))
    out = Path(given.pop("out", ROOT / "runs" / f"quality-{arguments.synthetic.name}-{against.name}")).expanduser()
    fold = _number("fold", given.pop("fold")) if "fold" in given else None
    if isinstance(fold, float):
        raise ConfigError(f"fold={fold}: a whole number is needed")
    segmenter = given.pop("segmenter", None)
    asked = Asked(
        synthetic=arguments.synthetic.expanduser(),
        against=against,
        part=given.pop("part", "validation"),
        folds=given.pop("folds", "frozen"),
        fold=fold,
        features=given.pop("features", "inception"),
        segmenter=Path(segmenter).expanduser() if segmenter else None,
        weights_dir=Path(given.pop("weights_dir", ROOT / "weights")).expanduser(),
        device=given.pop("device", "auto"),
    )
    if given:
        words = ("against", "part", "folds", "fold", "features", "segmenter", "weights_dir", "device", "out")
        raise ConfigError(unknown_name("word", next(iter(given)), words))
    with progress("quality") as show:
        found = judge(asked, lambda line: print(f"warning: {line}", file=sys.stderr), show)
    write(found, out)
    page = write_page(found, out, ["bushpc", "quality", str(arguments.synthetic), *arguments.words])
    for table in make_tables(found):
        _wide_console().print(to_rich(table))
    print(f"page: {page}")
    return 1 if found.copies else 0


def _weights(arguments: argparse.Namespace) -> None:
    from bushpc import weights
    from bushpc.config import compose

    if any(word.startswith("features=") for word in arguments.overrides):
        return _inception(arguments)
    config = compose(arguments.overrides)
    model = config.model.for_fold(config.fold or 0)
    if arguments.action == "pull":
        weights.pull(config.model_class, model, config.weights_folder)
    weights.require(config.model_class, model, config.weights_folder)
    files = config.model_class.weight_files(model)
    print(
        f"{config.weights_folder}: {len(files)} weight file(s) of model={config.choices['model']} staged and verified"
    )


def _inception(arguments: argparse.Namespace) -> None:
    """`bushpc weights … features=inception`: a file that belongs to no model here, but to `bushpc quality`."""
    from bushpc.config import ROOT
    from bushpc.generate.features import INCEPTION, pull_inception, require_inception

    given = _words(arguments.overrides)
    folder = Path(given.pop("weights_dir", ROOT / "weights")).expanduser()
    if given != {"features": INCEPTION}:
        raise ConfigError(f"{' '.join(arguments.overrides)}: write features={INCEPTION}, and weights_dir= if elsewhere")
    if arguments.action == "pull":
        pull_inception(folder)
    require_inception(folder)
    print(f"{folder}: weight file of features={INCEPTION} staged and verified")


def _predict(arguments: argparse.Namespace) -> int:
    """Exit status 3 if images were rejected."""
    from bushpc.evaluate.predict import CSV_FILE, Wanted, predict_files
    from bushpc.evaluate.predictor import load
    from bushpc.shards.progress import progress

    wanted = Wanted(
        prob=arguments.prob,
        uncertainty=arguments.uncertainty,
        overlay=arguments.overlay,
        prompts=arguments.prompts,
        pixel_mm=arguments.pixel_mm,
        batch_size=arguments.batch,
    )
    predictor = load(
        arguments.model,
        fold=arguments.fold,
        row=arguments.row,
        device=arguments.device,
        tta=arguments.tta,
        say=lambda line: print(f"warning: {line}", file=sys.stderr),
    )
    try:
        with progress("predict") as show:
            summary = predict_files(predictor, arguments.input, arguments.out, wanted, show)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    print(f"predicted: {summary.predicted}, done before: {summary.kept} file(s), rejected: {len(summary.rejected)}")
    print(f"written: {arguments.out / CSV_FILE}")
    return 3 if summary.rejected else 0


def _export(arguments: argparse.Namespace) -> None:
    from bushpc.evaluate.export import export

    content = export(
        arguments.run_dir,
        arguments.out,
        fold=arguments.fold,
        row=arguments.row,
        formats=arguments.format,
        say=lambda line: print(f"warning: {line}", file=sys.stderr),
    )
    names = ", ".join(fold["name"] for fold in content["folds"])
    print(f"{arguments.out}: {names}; use it with `bushpc predict {arguments.out} INPUT OUT`, or bushpc.load in Python")


def _generate(arguments: argparse.Namespace) -> int:
    from bushpc.config import compose_command
    from bushpc.dist import World
    from bushpc.generate.generate import SHEET_FILE, GenerateConfig, Source, check, generate
    from bushpc.shards.progress import progress

    given = _words(arguments.words)
    if "out" not in given:
        raise ConfigError("say where to: bushpc generate RUN out=FOLDER n=500")
    out = Path(given.pop("out")).expanduser()
    folds = {name: _number(name, given.pop(name)) for name in ("fold", "adapter_fold") if name in given}
    for name, fold in folds.items():
        if isinstance(fold, float):
            raise ConfigError(f"{name}={fold}: a whole number is needed")
    adapter = given.pop("adapter", None)
    source = Source(
        run_dir=arguments.run_dir,
        row=given.pop("row", None),
        adapter=Path(adapter).expanduser() if adapter else None,
        adapter_row=given.pop("adapter_row", None),
        **t.cast(dict[str, int], folds),
    )
    config = compose_command(GenerateConfig, "generate", [f"{key}={value}" for key, value in given.items()])
    if arguments.check:
        missing = check(source, out, config)
        print(f"{out}: {config.n} scans can be made there; {missing} of {len(config.batches)} batches are missing")
        return 0
    world = World.from_environment()
    try:
        with progress("generate") as show:
            manifest = generate(source, out, config, world=world, show=show)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BushpcError:
        if not world.is_main:  # rank 0 fails by the same error as a rule: then the launcher ends this one before
            time.sleep(LAUNCHER_ENDS_RANKS_S)
        raise
    if manifest:
        _say_packed(out, manifest)
        print(f"contact sheet: {out / SHEET_FILE}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from bushpc.dispatch.doctor import examine

    if arguments.slurm:
        return _survey(arguments)
    if arguments.time_limit or arguments.preempt_with is not None or arguments.write or arguments.force:
        raise ConfigError("--time-limit, --preempt-with, --write and --force belong to `bushpc doctor --slurm`")
    return _show_checks(examine(arguments.overrides), {}, arguments.json)


def _survey(arguments: argparse.Namespace) -> int:
    """`bushpc doctor --slurm`: what can be asked without a job is asked before one is submitted."""
    import datetime

    from bushpc.config import compose
    from bushpc.dispatch.doctor import check_slurm, is_broken
    from bushpc.dispatch.survey import profile_path, profile_text, survey
    from bushpc.files import write_atomically

    config = compose(arguments.overrides)
    if config.cluster.executor != "slurm":
        raise ConfigError(f"--slurm with cluster={config.choices['cluster']}: choose a Slurm cluster, cluster=slurm")
    profile = profile_path(arguments.write, arguments.force) if arguments.write else None
    before = check_slurm(config)
    if is_broken(before):
        return _show_checks(before, {}, arguments.json)

    def say(line: str) -> None:
        print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)

    try:
        found = survey(config, time_limit=arguments.time_limit, preempt_with=arguments.preempt_with, say=say)
    except KeyboardInterrupt:
        print("interrupted; the probe jobs are cancelled", file=sys.stderr)
        return 130
    if profile:
        write_atomically(profile, profile_text(config, found, datetime.date.today()))
    more = {**found.to_dict(), "profile": str(profile) if profile else None}
    status = _show_checks([*before, *found.checks], more, arguments.json)
    if profile and not arguments.json:
        print(f"written: {profile}; use it with cluster={profile.stem}")
    return status


def _drill(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from bushpc.config import compose
    from bushpc.dispatch.drill import drill, drill_table, plain_lines

    def say(line: str) -> None:
        print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)

    command = ["bushpc", "drill", *arguments.overrides]
    try:
        found = drill(compose(arguments.overrides), command=command, preempt_with=arguments.preempt_with, say=say)
    except KeyboardInterrupt:
        print("interrupted; the drill's jobs are cancelled", file=sys.stderr)
        return 130
    console = Console()
    if arguments.json:
        print(found.to_json())
    elif console.is_terminal:
        console.print(drill_table(found))
    else:
        print(plain_lines(found))
    if not arguments.json:
        print(f"written: {found.folder / 'drill.md'}")
    return 0 if found.ok else 1


def _show_checks(checks: t.Sequence[Check], more: dict[str, t.Any], as_json: bool) -> int:
    """A table on a terminal, lines in a log. Returns the exit status: 1 if something is broken."""
    import json

    from rich.console import Console

    from bushpc.dispatch.doctor import checks_table, is_broken, plain_lines

    console = Console()
    if as_json:
        print(json.dumps({**more, "checks": [vars(check) for check in checks]}, indent=1))
    elif console.is_terminal:
        console.print(checks_table(checks))
    else:
        print("\n".join(plain_lines(check) for check in checks))
    return 1 if is_broken(checks) else 0


def _watch(run_dir: Path, until_report: bool) -> RunStatus:
    """Follow a run: a live table on a terminal; in a log a line per change, and now and then."""
    from rich.console import Console
    from rich.live import Live

    from bushpc.dispatch.status import plain_line, read_status, status_table

    def going(status: RunStatus) -> bool:
        return any(cell.live for cell in status.cells) or (until_report and status.report_live)

    def again(status: RunStatus) -> RunStatus:
        # Slurm's controller serves the whole site, so it is asked seldom, and forgiven when it does not answer.
        asked_slurm = any(cell.job_id and not cell.local for cell in status.cells)
        for attempt in range(WATCH_RETRIES):
            time.sleep(WATCH_SLURM_S if asked_slurm else WATCH_S)
            try:
                return read_status(run_dir)
            except DispatchError as error:
                if attempt + 1 == WATCH_RETRIES:
                    raise
                print(f"{error}; asking again", file=sys.stderr)
        raise AssertionError

    console = Console()
    status = read_status(run_dir)
    if console.is_terminal:
        with Live(status_table(status, console.width), console=console, refresh_per_second=4) as live:
            while going(status):
                status = again(status)
                live.update(status_table(status, console.width))
        return status
    said: dict[str, tuple[str, float]] = {}
    while True:
        for cell in status.cells:
            stage, since = f"{cell.state} {cell.phase}", said.get(cell.name, ("", 0.0))
            due = cell.state == "running" and time.monotonic() - since[1] >= LINE_EVERY_S
            if stage != since[0] or due:
                print(time.strftime("%H:%M:%S"), plain_line(cell), flush=True)
                said[cell.name] = (stage, time.monotonic())
        if not going(status):
            return status
        status = again(status)


def _finish(run_dir: Path, status: RunStatus, wanted: t.Sequence[str]) -> int:
    """After --wait: the fold table and the report's path, and every cell that is not done with its reason."""
    from rich.console import Console

    from bushpc.report.page import build_report

    # The report job wrote it already, unless it was refused or died; an older page must not pass for this result.
    result = build_report(run_dir)
    Console().print(result.fold_table)
    print(f"report: {result.html}")
    unfinished = [cell for cell in status.cells if cell.name in wanted and cell.state != "done"]
    for cell in unfinished:
        print(f"{cell.name} {cell.state}: {cell.reason}", file=sys.stderr)
    return 1 if unfinished else 0


def _wide_console() -> Console:
    """Where output goes: a terminal with its width, or a file, in which nothing has to be left out."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=FILE_WIDTH)


def _words(words: t.Sequence[str]) -> dict[str, str]:
    given = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"'{word}': write key=value, for example data=breast src=FOLDER")
        given[key] = value
    return given


def _number(key: str, value: str) -> int | float:
    try:
        return int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        raise ConfigError(f"{key}={value}: a number is needed") from None


if __name__ == "__main__":
    sys.exit(main())
