"""Promises of `bushpc --help` and of commands that only read files: complete, and without torch."""

from __future__ import annotations

import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bushpc.cli
from bushpc.cli import main
from bushpc.cli.app import commands, groups
from bushpc.config import GROUPS, config_names

ROOT = Path(__file__).resolve().parents[2]
NEW_COMMAND = """
from bushpc.cli.command import Command, Group

HELLO = Command(name="hello", summary="Say hello.", run=lambda given: print("hi"), example="bushpc hello")
GROUP = Group("Mine", 99, (HELLO,))
"""


@pytest.mark.parametrize(
    "words", [["--help"], ["cv", "--help"], ["status", "RUN"], ["report", "RUN"], ["audit", "RUN"]]
)
def test_help_and_reading_a_run_import_no_torch(finished_run, words):
    code = (
        "import sys; from bushpc.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('torch imported:', 'torch' in sys.modules)"
    )
    words = [str(finished_run) if word == "RUN" else word for word in words]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("torch imported: False\n")
    assert "bushpc: " not in done.stderr


@pytest.fixture(scope="module")
def finished_run(phantom_folder, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    words = ["model=unet_small", "data=phantom", "cluster=local", "fold=0", "train.iterations=2", "train.warmup=0"]
    assert main(["cv", *words, f"data.root={phantom_folder}", f"runs_dir={runs}", "name=x", "--wait"]) == 0
    return runs / "x"


def test_help_of_no_command_imports_torch():
    code = (
        "import contextlib, sys\n"
        "from bushpc.cli import main\n"
        "from bushpc.cli.app import commands\n"
        "for name in commands():\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([*name.split(), '--help'])\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{shlex.quote(sys.executable)} -c 'from bushpc.cli import main; main([\"--help\"])' | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in commands().items():
        assert f"  {name} " in text
        assert command.summary in text


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_of_a_command_names_its_words_groups_options_and_an_example(name, capsys):
    command = commands()[name]
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert command.summary in " ".join(text.split())
    first = text.index(command.example)
    assert first < min(text.find(head) for head in ("options:", "words:", "groups (") if head in text)
    for option in command.options:
        assert option.names[-1] in text or option.how["metavar"] in text
    for word in command.words.table if command.words else ():
        assert f"  {word.name}= " in text
    if command.settings:
        for group in (*GROUPS, *(["grid"] if name == "grid" else [])):
            assert all(each in text for each in config_names(group))


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_example_can_be_parsed(name, monkeypatch):
    command = commands()[name]
    monkeypatch.setattr("bushpc.config.shards_folder", Path)
    for example in (command.example, *command.examples):
        first, *words = shlex.split(example)
        assert (first, words[: len(name.split())]) == ("bushpc", name.split())
        assert command.parse(words[len(name.split()) :])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stauts"], "unknown command 'stauts'; did you mean 'status'? Valid: audit, "),
        (["shards", "lst"], "unknown command 'shards lst'; did you mean 'shards list'?"),
        (["status", "--wacth", "x"], "did you mean '--watch'? Valid: --all, --html, --json, --watch."),
        (["report", "a", "b"], "bushpc report takes no 'b'. Example: bushpc report runs/table4."),
    ],
)
def test_a_wrong_command_or_option_names_the_right_one(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_new_command_is_one_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "hello.py").write_text(NEW_COMMAND)
    monkeypatch.setattr(bushpc.cli, "__path__", [*bushpc.cli.__path__, str(tmp_path)])
    groups.cache_clear()
    try:
        assert main(["hello"]) == 0
        assert capsys.readouterr().out == "hi\n"
        assert main(["--help"]) == 0
        assert "hello           Say hello." in capsys.readouterr().out
    finally:
        groups.cache_clear()
        sys.modules.pop("bushpc.cli.hello", None)


def test_the_rank_that_deepspeed_adds_is_ignored(capsys):
    assert main(["--local_rank=1", "--help"]) == 0
    assert "usage: bushpc" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_the_version_names_package_and_commit(word, capsys):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert main([word]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"bushpc {importlib.metadata.version('bushpc')}, commit {head or 'unknown'}")
    assert said.count("\n") == 1
