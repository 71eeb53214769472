"""Promises of the documentation: every command can be parsed, every setting exists, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bushpc.cli.app import commands
from bushpc.config import compose, described
from tools.docs import prose

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
SCRIPTS = sorted(ROOT.glob("slurm/*.sh"))
COMPOSED = ("cv", "train", "doctor", "drill", "weights pull", "weights check")


def lines(path: Path) -> list[str]:
    """The command lines: in code blocks of a page, in comments of a script."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".sh":
        found = re.findall(r"^# +((?:bushpc|bash|sbatch) .*)$", text, flags=re.MULTILINE)
    else:
        found = "\n".join(re.findall(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)).splitlines()
    found = [line for line in found if re.match(r"(bushpc|bash|sbatch|tools/\w+) ", line)]
    # A comment in a script stands behind several spaces; `…` and NAMES in capitals are for the reader to fill in.
    return [re.sub(r"<[^>]+>", "x", re.split(r" {2,}", line)[0] if path.suffix == ".sh" else line) for line in found]


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def typed(path: Path) -> list[tuple[str, list[str]]]:
    """Every bushpc command of a file, by name and words."""
    found = []
    for line in lines(path):
        words = words_of(line)
        if words[:1] == ["bushpc"] and "…" not in line and "[" not in words[-1][:1]:
            name = next((name for name in (" ".join(words[1:3]), words[1]) if name in commands()), None)
            assert name or words[1] in ("--help", "COMMAND"), f"{path.name}: {line}"
            if name:
                found.append((name, words[1 + len(name.split()) :]))
    return found


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_shown_can_be_parsed_and_its_settings_exist(path, monkeypatch):
    monkeypatch.setattr("bushpc.config.shards_folder", Path)
    composed = set()
    for name, words in typed(path):
        command = commands()[name]
        given = command.parse(words)
        if name in COMPOSED and not any(word.startswith("features=") for word in words):
            composed.add(tuple(given.typed))
    for settings in composed:
        # The base, the synthetic scans, an imported cohort and the site's yaml are the reader's own.
        own = ("model.base=", "data.synthetic", "data.real=", "data.stream=", "data.root=")
        words = ["data=breast" if word == "data=mine" else word for word in settings]
        compose([word for word in words if not word.startswith(own)])


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_shown_is_there(path):
    for line in lines(path):
        for word in words_of(line):
            if re.match(r"(slurm|tools)/\w", word) and words_of(line)[0] in ("bash", "sbatch", word):
                assert (ROOT / word).exists(), line


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_paths_of_tests_that_the_docs_name_are_there():
    for path in PAGES:
        for target in re.findall(
            r"`((?:tests|bushpc|configs|slurm|tools)/[\w/.-]+\.\w+)`", path.read_text(encoding="utf-8")
        ):
            if not re.search("mynet|mydata|mysite|mine|hello", target):  # the reader's own
                assert (ROOT / target).exists(), f"{path.name}: {target}"


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 700


def test_the_command_reference_lists_every_command():
    text = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `bushpc ([a-z ]+)` \|", text, flags=re.MULTILINE)) == set(commands())


def test_the_run_folder_reference_is_the_layout():
    layout = (ROOT / "bushpc" / "runs" / "layout.py").read_text(encoding="utf-8").split('"""')[1]
    page = (ROOT / "docs" / "reference" / "run-folder.md").read_text(encoding="utf-8")
    assert layout.split("\n", 2)[2].strip() in page


def test_the_page_on_settings_names_every_section():
    table = (ROOT / "docs" / "reference" / "settings.md").read_text().split("| section |")[1].split("\n\n")[0]
    keys = [each.key.partition(".") for each in described()]
    sections = {f"{section}.*" if name else section for section, _, name in keys} | {"model.*"}
    named = set(re.findall(r"`([^`]+)`", table))
    assert {name for name in named if name.count(".") < 2} == sections
    for nested in named - sections:
        assert any(each.key.startswith(nested.removesuffix("*")) for each in described()), nested


def test_plain_english_is_checked_outside_of_code_and_tables():
    text = "# Utilize\n\n| utilize |\n\n```\nutilize\n```\n\nDo not\nutilize `anew` here. Start anew, please.\n"
    [first, second] = prose.faults({"a.md": text})
    assert first == "a.md: 'utilize' in 'Do not utilize CODE here. …': write use"
    assert "'anew'" in second
    assert not prose.faults({"a.md": f"{'word ' * (prose.LONGEST - 1)}end."})
    assert "at most" in prose.faults({"a.md": f"{'word ' * prose.LONGEST}end."})[0]
