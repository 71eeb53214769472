"""The report as a whole: honest, self-contained, safe, and never half-written."""

import csv
import html.parser
import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap

import pytest
import rich.console

from bushpc.errors import DataError
from bushpc.metrics.registry import ALWAYS
from bushpc.report import build_report


class Page(html.parser.HTMLParser):
    """Visible text, and what the page would load."""

    def __init__(self, path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.words: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture
def two_sources(builder, rows_with_dice):
    """Fold means of Dice 0.1, 0.2 … 0.5 for first_pass, and 0.3 more for the oracle."""
    return builder.complete(
        {
            k: rows_with_dice(k, {"first_pass": [0.1 * k + 0.05, 0.1 * k + 0.15], "oracle": [0.1 * k + 0.35] * 2})
            for k in range(5)
        }
    )


def _csv(run, name: str) -> list[dict[str, str]]:
    with (run.path / "report" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_summary_holds_hand_worked_means_and_sd(two_sources) -> None:
    summary = build_report(two_sources.path).content
    dice = summary["metrics"]["first_pass"]["dice"]
    assert dice["per_fold"] == {str(k): pytest.approx(0.1 * k + 0.1) for k in range(5)}
    assert dice["mean"] == pytest.approx(0.3)
    assert dice["sd"] == pytest.approx(0.025**0.5)  # sum of squares 0.10 over 4
    assert summary["difference"]["dice"]["mean"] == pytest.approx(0.25)
    assert summary["strata"]["first_pass"]["111-250"]["n"] == 10
    assert summary["strata"]["first_pass"]["0-110"]["dice"] == {"mean": None, "partial_mean": None}
    assert summary["complete"] is True


def test_summary_csv_and_page_say_the_same(realistic) -> None:
    result = build_report(realistic.path)
    assert json.loads((realistic.path / "report" / "summary.json").read_text()) == result.content
    ours = [line for line in _csv(realistic, "headline") if line["group"].startswith("this run")]
    page = Page(result.html).text
    for line, figures in zip(ours, result.content["metrics"].values(), strict=True):
        for metric in ALWAYS:
            assert float(line[metric]) == figures[metric]["mean"]
            assert float(line[f"{metric}_sd"]) == figures[metric]["sd"]
            assert f"{figures[metric]['mean']:.4f} ± {figures[metric]['sd']:.4f}" in page
    folds = [line for line in _csv(realistic, "folds") if line["fold"] == "3"]
    assert float(folds[0]["dice"]) == result.content["metrics"]["first_pass"]["dice"]["per_fold"]["3"]


def test_a_missing_fold_is_named_and_never_averaged_silently(builder, rows_with_dice) -> None:
    builder.complete({k: rows_with_dice(k, {"first_pass": [0.1 * k + 0.1]}) for k in range(4)})
    builder.failed(4, "node went away")
    result = build_report(builder.path)
    assert result.content["folds"]["missing"] == [{"cell": "fold4", "fold": 4, "reason": "node went away"}]
    dice = result.content["metrics"]["first_pass"]["dice"]
    assert (dice["mean"], dice["sd"], dice["partial_mean"]) == (None, None, pytest.approx(0.25))
    assert result.content["strata"]["first_pass"]["111-250"]["dice"]["mean"] is None
    page = Page(result.html).text
    assert "INCOMPLETE: fold 4 missing. Fold 4: node went away." in page
    assert "Means below are over 4 of 5 folds and are not a 5-fold result." in page
    assert "Mean over 4 of 5 folds" in page
    ours = re.sub(r"XBusNet paper, Table 1.*?Segmentation at", "", page)
    assert "±" not in ours
    assert _csv(builder, "folds")[4]["fold"] == "4 (missing)"
    assert "4 of 5 folds" in (builder.path / "report" / "headline.tex").read_text()


def test_a_run_with_no_complete_fold_still_gives_an_honest_page(builder) -> None:
    builder.trained(0, steps=100)
    result = build_report(builder.path)
    page = Page(result.html).text
    assert "INCOMPLETE: folds 0, 1, 2, 3, 4 missing." in page
    assert "No fold is complete, so there are no results." in page
    assert result.content["metrics"] == {}
    assert not (builder.path / "report" / "headline.csv").exists()


def test_one_fold_alone_has_no_sd(tmp_path, builder, rows_with_dice) -> None:
    builder.folds = 1
    builder.run.pop("cells")
    builder.write_run_json()
    builder.complete({0: rows_with_dice(0, {"first_pass": [0.5, 0.7]})})
    result = build_report(builder.path)
    assert result.content["metrics"]["first_pass"]["dice"]["sd"] is None
    assert "One fold has no standard deviation." in Page(result.html).text


def test_the_oracle_is_labelled_wherever_it_appears(realistic) -> None:
    realistic.write_run_json(command=["bushpc", "cv"])
    result = build_report(realistic.path)
    label = "oracle (uses the ground-truth mask)"
    texts = {"page": Page(result.html).text}
    for path in (realistic.path / "report").glob("*.[ct][se][vx]"):
        texts[path.name] = path.read_text()
    console = rich.console.Console(width=80, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(build_report(realistic.path).fold_table)
    texts["terminal"] = console.export_text()
    assert {name for name, text in texts.items() if "oracle" in text} >= {
        "page",
        "headline.csv",
        "folds.tex",
        "terminal",
    }
    for name, text in texts.items():
        assert text.count("oracle") == text.count(label), name
    assert result.content["sources"]["oracle"] == {"label": label, "uses_ground_truth": True}


def test_published_figures_are_marked_and_only_shown_where_they_belong(two_sources) -> None:
    page = Page(build_report(two_sources.path).html).text
    for table in (1, 2, 3):
        assert f"XBusNet paper, Table {table} (figures as printed there)" in page
    assert "0.877 ± 0.014" in page
    assert "Segmentation at threshold 0.4" in page
    two_sources.write_run_json(data="phantom")
    page = Page(build_report(two_sources.path).html).text
    assert "paper" not in page.lower()


def test_a_model_without_prompts_has_no_prompt_parts(builder, rows_with_dice) -> None:
    builder.write_run_json(model="vit_diffusion")
    builder.complete({k: rows_with_dice(k, {"none": [0.5, 0.6]}) for k in range(5)})
    result = build_report(builder.path)
    page = Page(result.html).text
    assert result.content["difference"] is None
    assert "no prompts" in page
    assert "oracle" not in page
    assert "first_pass" not in page


def test_the_page_is_one_file_that_loads_nothing(realistic) -> None:
    result = build_report(realistic.path)
    page = Page(result.html)
    assert page.open == []
    assert page.loads
    assert all(value.startswith(("#", "data:image/")) for value in page.loads)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "@import" not in page.source
    assert "url(" not in page.source
    assert result.html.stat().st_size < 3_000_000


def test_every_link_of_the_contents_leads_to_a_section(realistic) -> None:
    page = Page(build_report(realistic.path).html)
    targets = [value[1:] for value in page.loads if value.startswith("#")]
    assert len(targets) == 13
    assert all(f'<section id="{target}">' in page.source for target in targets)


def test_names_from_users_and_files_are_shown_and_never_run(realistic, row) -> None:
    evil = "<script>alert(1)</script>"
    realistic.write_run_json(name=evil, model=evil, command=["bushpc", evil], versions={evil: evil})
    (realistic.cell(0) / "config.yaml").write_text(f"name: {evil}")
    realistic.evaluated(1, [row(evil, 1, s, spatial_prompt=evil) for s in ("first_pass", "oracle", "none")])
    (realistic.cell(2) / "DONE").unlink()
    (realistic.cell(2) / "per_image.csv").unlink()
    realistic.failed(2, f'{evil}"><img src=x onerror=alert(1)>')
    page = Page(build_report(realistic.path).html)
    assert "script" not in page.tags
    assert all(value.startswith(("#", "data:image/")) for value in page.loads)
    assert page.text.count(evil) >= 5


def test_the_same_run_gives_the_same_report_twice(realistic) -> None:
    def files() -> dict[str, bytes]:
        build_report(realistic.path)
        return {path.name: path.read_bytes() for path in (realistic.path / "report").iterdir()}

    first = files()
    names = ("headline", "comparisons", "fold_comparisons", "nemenyi", "folds", "strata", "calibration", "difference")
    assert set(first) == {"index.html", "report.md", "summary.json", "references.bib"} | {
        f"{name}.{kind}" for name in (*names, "cells", "shards", "claim") for kind in ("csv", "tex")
    }
    assert files() == first


def test_a_report_killed_while_writing_leaves_the_old_one_whole(two_sources) -> None:
    build_report(two_sources.path)
    folder = two_sources.path / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    two_sources.write_run_json(name="another name, so that every file of the page would change")
    script = """
        import os, signal, sys
        from pathlib import Path
        from bushpc.report import build_report
        flush, left = os.fsync, [3]
        def die_at_the_third_file(descriptor):
            flush(descriptor)
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = die_at_the_third_file
        build_report(Path(sys.argv[1]))
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(two_sources.path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (leftover,) = two_sources.path.glob("report.tmp-*")
    os.utime(leftover, (0, 0))
    assert build_report(two_sources.path).content["run"].startswith("another name")
    assert not list(two_sources.path.glob("report.*"))


def test_a_report_killed_between_its_two_renames_is_brought_back(two_sources) -> None:
    build_report(two_sources.path)
    (two_sources.path / "report").rename(two_sources.path / "report.old-x")
    (two_sources.cell(0) / "per_image.csv").write_text("key\n")
    with pytest.raises(DataError, match="no column"):
        build_report(two_sources.path)
    assert (two_sources.path / "report" / "index.html").is_file()


@pytest.mark.parametrize(("run", "report"), [(0o2775, 0o775), (0o755, 0o755)])
def test_who_may_write_into_the_run_may_delete_its_report_to_replace_it(two_sources, run, report) -> None:
    two_sources.path.chmod(run)
    before = os.umask(0o022)
    try:
        build_report(two_sources.path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((two_sources.path / "report").stat().st_mode) & 0o777 == report


def test_damaged_results_leave_the_old_report_alone(two_sources) -> None:
    build_report(two_sources.path)
    before = (two_sources.path / "report" / "index.html").read_bytes()
    (two_sources.cell(0) / "per_image.csv").write_text("key\n")
    with pytest.raises(DataError, match=r"fold0/per_image\.csv"):
        build_report(two_sources.path)
    assert (two_sources.path / "report" / "index.html").read_bytes() == before
    assert [path.name for path in two_sources.path.glob("report*")] == ["report"]


def test_missing_pictures_become_a_statement_and_the_numbers_stay(two_sources) -> None:
    result = build_report(two_sources.path)
    assert "no predictions are shown" in Page(result.html).text
    assert result.content["metrics"]["first_pass"]["dice"]["mean"] == pytest.approx(0.3)


def test_provenance_is_enough_to_repeat_the_run(two_sources) -> None:
    page = Page(build_report(two_sources.path).html).text
    for fact in (
        "bushpc cv model=xbusnet data=breast",
        "0123abc",
        "0" * 64,
        "f" * 64,
        "torch 2.15.0",
        "iterations: 1000",
    ):
        assert fact in page.replace("\xa0", " ")
    assert [line["config_hash"] for line in _csv(two_sources, "cells")] == [f"{k:08x}" for k in range(5)]


def test_the_page_shows_where_the_time_of_each_cell_went(two_sources) -> None:
    two_sources.spent(0, {"start": 40, "step": 400, "load": 100}, {"start": 50, "step": 500, "evaluate": 250})
    two_sources.spent(3, {"start": 10})
    page = Page(build_report(two_sources.path).html)
    first, second = _csv(two_sources, "time")
    assert (first["cell"], first["attempts"], first["replayed_steps"]) == ("fold0", "2", "20")
    causes = {key.removesuffix("_seconds"): float(first[key]) for key in first if key.endswith("_seconds")}
    assert causes == {
        "wall": 1400, "productive": 800, "load": 100, "save": 0, "evaluate": 250, "other": 0, "replay": 100,
        "lost": 0, "start": 90, "queue": 60, "requeue": 0, "idle": 0,
    }  # fmt: skip
    assert float(first["goodput"]) == pytest.approx(800 / 1400)
    assert float(first["gpu_hours"]) == pytest.approx(2 * 1340 / 3600)
    assert (second["cell"], float(second["goodput"])) == ("fold3", 0.0)
    assert "How the time of every cell was spent" in page.text
    assert "0.571" in page.text
    assert "steps done again" in (two_sources.path / "report" / "time.tex").read_text()


def test_a_run_of_which_no_cell_has_started_says_so(builder) -> None:
    assert "No fold has started yet." in Page(build_report(builder.path).html).text
    assert not (builder.path / "report" / "time.csv").exists()


def test_the_report_needs_no_torch() -> None:
    script = "import sys, bushpc.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
