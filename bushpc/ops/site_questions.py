"""`bushpc init`: six questions about a site, with what its Slurm tells as proposals → configs/cluster/<NAME>.yaml.

    words given + answers ─compose→ profile ─require→ the site could run it ─write→ a yaml, whole or not at all

Whatever is wrong with an answer is known before the next question; nothing is written before the last one.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import typing as t
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bushpc.cluster.base import cluster_for
from bushpc.cluster.checks import BROKEN, OK, Check, run_check
from bushpc.cluster.profile import report_profile
from bushpc.config import ClusterConfig, as_word, compose, config_names, described
from bushpc.config.cluster import GPUS
from bushpc.errors import ConfigError, DispatchError
from bushpc.ops.survey_profile import profile_path, what_is_there, write_profile, yaml_text

EXECUTOR = "slurm"
NOTHING = ("", "-", "none", "null")
# Setting of `cluster.` → the question.
QUESTIONS: Mapping[str, str] = {
    "partition": "Partition of the jobs that train",
    "account": "Account",
    "gpus": "GPUs of a cell, as NUMBER or TYPE:NUMBER; 0 trains on the CPU",
    "time_min": "Time limit of a job in minutes; a cell that needs longer saves and goes on in its next turn",
    "cpu_jobs.partition": "Partition of the jobs without a GPU, such as the report",
}
# What a proposal of GPUs brings along.
ALONG = ("cpus_per_rank", "mem_gb", "cells_per_job", "report")
NAME = "--name"
FIELDS = {each.key.split(".")[1] for each in described() if each.key.startswith("cluster.")}
ACCOUNT = "account and qos"
# By `bushpc doctor --slurm`.
MEASURED_LATER = ("grace time",)

# The text of a question, what there is to choose from, and the proposal → the answer; "" takes the proposal.
Ask = Callable[[str, Sequence[str], str], str]
Say = Callable[[str], None]


@dataclass(kw_only=True)
class Site:
    """What is known so far. words: `cluster.partition=gpu` …, as given or answered. force: a profile is replaced."""

    words: list[str] = field(default_factory=list)
    name: str = ""
    force: bool = False

    @property
    def profile(self) -> ClusterConfig:
        """Raises: ConfigError."""
        return compose([f"cluster={EXECUTOR}", *self.words]).cluster

    def is_given(self, key: str) -> bool:
        return any(word.partition("=")[0] == f"cluster.{key}" for word in self.words)


def own_words(typed: Iterable[str]) -> list[str]:
    """The words of a site's profile. Raises: ConfigError for settings that have nothing to do with a site."""
    words = list(typed)
    for word in words:
        if not word.startswith("cluster."):
            near = f"did you mean 'cluster.{word}'? " if word.partition("=")[0].split(".")[0] in FIELDS else ""
            raise ConfigError(
                f"'{word}': {near}A site's profile has settings of cluster. alone. Example: bushpc init --name mysite "
                "cluster.partition=gpu cluster.account=my_project. All: bushpc config --all --only cluster"
            )
    return words


def interview(site: Site, ask: Ask, say: Say) -> Path:
    """Ask what is not given yet, and write the profile; returns its path.

    ask: is asked again after an answer that cannot be; raises where nobody answers. say: lines for the user.
    Raises: ConfigError for given words that cannot be; DispatchError where Slurm does not answer.
    """
    cluster = cluster_for(EXECUTOR)
    _require(site)
    try:
        here, there = cluster.here(), list(cluster.describe())
    except DispatchError as error:
        raise DispatchError(
            f"Slurm does not answer here: {error}. Run `bushpc init` on a login node; cluster=local needs no profile"
        ) from error
    say(f"Slurm cluster '{here}':")
    for check in there:
        say(f"  {check.name}: {check.found}")
    _name(site, here, ask, say)
    for key, question in QUESTIONS.items():
        if not site.is_given(key):
            _setting(site, key, question, ask, say)
        elif key == "gpus":
            site.words += _along(site, site.profile.gpus)
    site.words += _times(site)
    _require(site)
    header = ["# This site's Slurm.", f"# Written {datetime.date.today().isoformat()} by `bushpc init`. Slurm told:"]
    profile = site.profile
    path = profile_path(site.name, site.force, NAME)  # minutes have passed: another may have taken it
    write_profile(path, yaml_text(header, what_is_there(profile), profile))
    return path


def concerns(profile: ClusterConfig) -> list[Check]:
    """What the site would refuse of jobs of this profile, or let wait for long; one tried job of each kind included."""
    parts = cluster_for(EXECUTOR).checks()
    checks = [check for name, part in parts for check in run_check(name, part, profile)]
    return [check for check in checks if check.verdict != OK and check.name not in MEASURED_LATER]


def _name(site: Site, here: str, ask: Ask, say: Say) -> None:
    if site.name:
        profile_path(site.name, site.force, NAME)
        return
    proposal = re.sub(r"[^a-z0-9_-]+", "_", here.lower()).strip("_-") or "mysite"
    if proposal in config_names("cluster"):
        say(f"cluster={proposal} exists already: use it as it is, or write one of another name")
        proposal = f"my_{proposal}"
    while not site.name:
        name = ask("Name of the profile, then used as cluster=NAME", (), proposal).strip() or proposal
        with _told(say):
            profile_path(name, site.force, NAME)
            site.name = name


def _setting(site: Site, key: str, question: str, ask: Ask, say: Say) -> None:
    proposed = _proposals(site).get(key)
    shown = "the cluster's default" if proposed is None else as_word(proposed)
    choices = cluster_for(EXECUTOR).choices(site.profile).get(key, [])
    while not site.is_given(key):
        answer = ask(question, choices, shown).strip()
        value = as_word(proposed) if answer in ("", shown) else "null" if answer in NOTHING else answer
        words = [*site.words, f"cluster.{key}={value}"]
        with _told(say):
            if key == "gpus":
                words += _along(site, value)
            _require(Site(words=words))
            site.words = words


def _times(site: Site) -> list[str]:
    """The time limits that are not given yet: the usual ones, or less where the partitions allow less."""
    cluster, profile = cluster_for(EXECUTOR), site.profile
    found = []
    for key, job in (("time_min", profile), ("report_time_min", report_profile(profile))):
        longest = cluster.choices(job)["time_min"]
        if longest and int(longest[0]) < getattr(profile, key) and not site.is_given(key):
            found.append(f"cluster.{key}={longest[0]}")
    return found


def _proposals(site: Site) -> dict[str, t.Any]:
    """Setting → what Slurm tells for what is open."""
    usual = {"gpus": 0, "time_min": Site(words=[*site.words, *_times(site)]).profile.time_min}
    return usual | cluster_for(EXECUTOR).suggest(site.profile)


def _along(site: Site, gpus: t.Any) -> list[str]:
    """What else a cell with these GPUs asks for: their share of a node, and a rank for each."""
    proposed = _proposals(site)
    match = GPUS.fullmatch(str(gpus or 0))
    count = int(match[2]) if match else 0
    if not count:
        return []
    if str(gpus) == as_word(proposed["gpus"]):
        found = {key: value for key, value in proposed.items() if key in ALONG}
    else:
        found = {"cpus_per_rank": proposed.get("cpus_per_rank")}
        found |= {"ranks_per_node": count} if count > 1 else {}
        found |= {"mem_gb": proposed["mem_gb"] * count} if "mem_gb" in proposed else {}
    return [f"cluster.{key}={as_word(value)}" for key, value in found.items() if value and not site.is_given(key)]


def _require(site: Site) -> None:
    """Raises: ConfigError for what cannot be, or the site could never run."""
    cluster, profile = cluster_for(EXECUTOR), site.profile
    if site.words:
        # Times that are still open must not speak against a partition.
        short = [f"cluster.{key}=1" for key in ("time_min", "report_time_min") if not site.is_given(key)]
        cluster.require(Site(words=[*site.words, *short]).profile)
    if profile.account is None:
        return
    for check in run_check(ACCOUNT, dict(cluster.checks())[ACCOUNT], profile):
        if check.verdict == BROKEN:
            raise ConfigError(f"{check.found} {check.advice}")


@contextlib.contextmanager
def _told(say: Say) -> t.Iterator[None]:
    """Say what is wrong with an answer; the question is then asked again."""
    try:
        yield
    except ConfigError as error:
        say(str(error))
