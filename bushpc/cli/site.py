"""`bushpc doctor | drill | weights`: is everything ready here."""

from __future__ import annotations

import sys
import typing as t

from bushpc.cli import weights_import
from bushpc.cli.command import CONTINUE, JSON, Arguments, Command, Group, option
from bushpc.cli.show import log
from bushpc.cli.words import PATH, TEXT, Word, Words
from bushpc.errors import ConfigError

if t.TYPE_CHECKING:
    from bushpc.cluster.checks import Check


def doctor(given: Arguments) -> int:
    from bushpc.ops.doctor import examine

    if given.slurm:
        return _survey(given)
    if given.time_limit or given.preempt_with is not None or given.write or given.force:
        raise ConfigError("--time-limit, --preempt-with, --write and --force belong to `bushpc doctor --slurm`")
    return _print_checks(examine(given.typed), {}, given.json)


def _survey(given: Arguments) -> int:
    """`bushpc doctor --slurm`: check what can be checked without a job, then submit probes."""
    import datetime

    from bushpc.cluster.checks import is_broken
    from bushpc.config import compose
    from bushpc.ops.doctor import check_cluster
    from bushpc.ops.survey import survey
    from bushpc.ops.survey_profile import completed, profile_path, profile_text, write_profile

    config = compose(given.typed)
    if config.cluster.executor != "slurm":
        raise ConfigError(f"--slurm with cluster={config.choices['cluster']}: choose a Slurm cluster, cluster=slurm")
    profile = profile_path(given.write, given.force) if given.write else None
    if profile:
        config = completed(config, given.typed, say=log)
    before = check_cluster(config)
    if is_broken(before):
        return _print_checks(before, {}, given.json)
    try:
        found = survey(config, time_limit=given.time_limit, preempt_with=given.preempt_with, say=log)
    except KeyboardInterrupt:
        print("interrupted; the probe jobs are cancelled", file=sys.stderr)
        return 130
    if profile:
        write_profile(profile, profile_text(config, found, datetime.date.today()))
    more = {**found.to_dict(), "profile": str(profile) if profile else None}
    status = _print_checks([*before, *found.checks], more, given.json)
    if profile and not given.json:
        print(f"written: {profile}; use it with cluster={profile.stem}")
    return status


def _print_checks(checks: t.Sequence[Check], more: dict[str, t.Any], as_json: bool) -> int:
    """Returns the exit status: 1 if something is broken."""
    import json

    from rich.console import Console

    from bushpc.cluster.checks import is_broken
    from bushpc.ops.doctor import checks_table, plain_lines

    console = Console()
    if as_json:
        print(json.dumps({**more, "checks": [vars(check) for check in checks]}, indent=1))
    elif console.is_terminal:
        console.print(checks_table(checks))
    else:
        print("\n".join(plain_lines(check) for check in checks))
    return 1 if is_broken(checks) else 0


def drill(given: Arguments) -> int:
    from rich.console import Console

    from bushpc.config import compose
    from bushpc.ops import drill as room
    from bushpc.ops.drill_found import drill_table, plain_lines

    command = ["bushpc", "drill", *given.typed]
    try:
        found = room.drill(compose(given.typed), command=command, preempt_with=given.preempt_with, say=log)
    except KeyboardInterrupt:
        print("interrupted; the drill's jobs are cancelled", file=sys.stderr)
        return 130
    console = Console()
    if given.json:
        print(found.to_json())
    elif console.is_terminal:
        console.print(drill_table(found))
    else:
        print(plain_lines(found))
    if not given.json:
        print(f"written: {found.folder / 'drill.md'}")
    return 0 if found.ok else 1


INCEPTION_WORDS = Words(
    Word("features", TEXT, "Inception's weights for `bushpc quality`.", required=True, choices=("inception",)),
    Word("weights_dir", PATH, "Where to stage them.", shown="weights"),
    command="bushpc weights pull features=inception",
    example="bushpc weights pull features=inception weights_dir=weights",
)


def pull(given: Arguments) -> None:
    _weights(given, pull=True)


def check(given: Arguments) -> None:
    _weights(given, pull=False)


def _weights(given: Arguments, *, pull: bool) -> None:
    from bushpc import weights
    from bushpc.config import compose
    from bushpc.data.lineage import licences_of_pulled
    from bushpc.shards.licences import requirements

    if any(word.startswith("features=") for word in given.typed):
        return _inception(given, pull=pull)
    config = compose(given.typed)
    model = config.model.for_fold(config.fold or 0)
    if pull:
        weights.pull(config.model_class, model, config.weights_folder)
    weights.require(config.model_class, model, config.weights_folder)
    files = model.weight_files()
    for each in licences_of_pulled(files):
        terms = ", ".join(sorted(requirements(each.licence)))
        print(f"{each.title}: licence {each.licence}{f' ({terms}: read it at {each.where})' if terms else ''}")
    print(
        f"{config.weights_folder}: {len(files)} weight file(s) of model={config.choices['model']} staged and verified"
    )


def _inception(given: Arguments, *, pull: bool) -> None:
    """`bushpc weights … features=inception`: a file that no model needs, but `bushpc quality` does."""
    from bushpc.config.places import home
    from bushpc.generate.features import INCEPTION, pull_inception, require_inception

    folder = INCEPTION_WORDS.read(given.typed)["weights_dir"] or home() / "weights"
    if pull:
        pull_inception(folder)
    require_inception(folder)
    print(f"{folder}: weight file of features={INCEPTION} staged and verified")


PREEMPT_WITH = "--preempt-with"
PREEMPTOR = "for example '--partition=high --exclusive'"
INCEPTION_NOTE = "features=inception instead of a model: the weights that `bushpc quality` needs for FID and KID."

GROUP = Group(
    "Site",
    80,
    (
        Command(
            name="doctor",
            summary="Check that installation, shards, weights, folders and cluster fit the settings.",
            run=doctor,
            example="bushpc doctor model=xbusnet data=breast cluster=slurm",
            options=(
                JSON,
                option("--slurm", action="store_true", help="submit probe jobs that measure how jobs end here"),
                option(
                    "--time-limit", action="store_true", help="with --slurm: also run into a time limit (3 minutes)"
                ),
                option(
                    PREEMPT_WITH,
                    metavar="OPTIONS",
                    help=f"with --slurm: also preempt the probe by a job with these sbatch options, {PREEMPTOR}",
                ),
                option(
                    "--write",
                    metavar="NAME",
                    help="with --slurm: write configs/cluster/NAME.yaml from what the site has and the probes find",
                ),
                option("--force", action="store_true", help="with --write: overwrite it"),
            ),
            settings=True,
            notes=("Exit status 1: something would not work.",),
        ),
        Command(
            name="drill",
            summary="Interrupt a short run in every way your permissions allow, and compare its weights.",
            run=drill,
            example="bushpc drill model=xbusnet data=breast cluster=slurm",
            options=(
                JSON,
                option(
                    PREEMPT_WITH,
                    metavar="OPTIONS",
                    help=f"also preempt it by a job with these sbatch options, {PREEMPTOR}",
                ),
            ),
            settings=True,
        ),
        Command(
            name="weights pull",
            summary="Download a model's pretrained weights, on a machine with internet.",
            after_interrupt=CONTINUE,
            run=pull,
            example="bushpc weights pull model=xbusnet",
            settings=True,
            notes=(INCEPTION_NOTE,),
        ),
        Command(
            name="weights check",
            summary="Check that a model's pretrained weights are staged and intact.",
            run=check,
            example="bushpc weights check model=xbusnet",
            settings=True,
            notes=(INCEPTION_NOTE,),
        ),
        *weights_import.COMMANDS,
    ),
)
