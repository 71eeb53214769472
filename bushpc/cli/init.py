"""`bushpc init`: a profile of this site, from six questions or from words."""

from __future__ import annotations

import sys
import typing as t
from collections.abc import Sequence

from bushpc.cli.command import JSON, Arguments, Command, Group, option
from bushpc.errors import ConfigError

if t.TYPE_CHECKING:
    from bushpc.ops.site_questions import Ask


def init(given: Arguments) -> None:
    from bushpc.ops.site_questions import Site, concerns, interview, own_words
    from bushpc.ops.survey_profile import stated

    site = Site(words=own_words(given.typed), name=given.name or "", force=given.force)
    path = interview(site, _take_proposals() if given.yes else _ask(), _say)
    found = concerns(site.profile)
    if given.json:
        import json

        rows = [vars(check) for check in found]
        content = {"profile": str(path), "cluster": site.name, "settings": stated(site.profile), "checks": rows}
        print(json.dumps(content, indent=1))
        return
    for check in found:
        _say(f"{check.verdict}: {check.name}: {check.found}{f'; {check.advice}' if check.advice else ''}")
    print(f"written: {path}; use it with cluster={site.name}")
    print(f"next: bushpc doctor model=unet data=phantom cluster={site.name}")
    print(f"measure how jobs end here: bushpc doctor --slurm --write {site.name} --force cluster={site.name}")


def _ask() -> Ask:
    """Questions go to stderr, so that stdout stays for JSON; answers may come from a file as well."""

    def ask(question: str, choices: Sequence[str], proposal: str) -> str:
        offered = f" ({', '.join(choices)})" if choices else ""
        print(f"{question}{offered} [{proposal}]: ", end="", file=sys.stderr, flush=True)
        try:
            return input()
        except EOFError:
            raise ConfigError(
                f"nobody answers '{question}': answer it, give the setting (bushpc init --help), or take what Slurm "
                "tells with --yes. Nothing was written"
            ) from None

    print("Enter takes what stands in brackets; '-' is the cluster's default; Ctrl-C ends without writing.",
          file=sys.stderr)  # fmt: skip
    return ask


def _take_proposals() -> Ask:
    asked: set[str] = set()

    def ask(question: str, choices: Sequence[str], proposal: str) -> str:
        if question in asked:
            raise ConfigError(
                f"--yes: what Slurm tells for '{question}' cannot be used ({proposal}): give the setting yourself "
                "(bushpc init --help). Nothing was written"
            )
        asked.add(question)
        return ""

    return ask


def _say(line: str) -> None:
    print(line, file=sys.stderr)


GROUP = Group(
    "Site",
    80,
    (
        Command(
            name="init",
            summary="Write a profile of this site's Slurm: six questions, each with what Slurm tells as proposal.",
            run=init,
            example="bushpc init",
            examples=(
                "bushpc init --name mysite --yes cluster.partition=gpu cluster.account=my_project cluster.time_min=720",
            ),
            after_interrupt="nothing was written",
            options=(
                option("--name", metavar="NAME", help="name of the profile, then used as cluster=NAME"),
                option(
                    "--yes", action="store_true", help="ask nothing: take what Slurm tells for all that is not given"
                ),
                option("--force", action="store_true", help="replace a profile of that name"),
                JSON,
            ),
            settings=True,
            notes=(
                "Settings that are given are not asked for; all of cluster. may be given. What the site could never "
                "run is refused, and nothing is written.",
            ),
        ),
    ),
)
