"""One table, four renderings that say the same."""

import csv
import io
import re
from dataclasses import dataclass

import pytest
import rich.console

from bushpc.report.render import latex, to_csv, to_html, to_latex, to_rich
from bushpc.report.table import NOTHING, Column, Number, RowData, Table


@dataclass(frozen=True, kw_only=True)
class Measured(RowData):
    """A row of the tables of this file."""

    method: str = ""
    dice: Number = NOTHING
    fnr: Number = NOTHING


@pytest.fixture
def table() -> Table:
    return Table.of(
        "demo",
        "A_caption & 100 %",
        (
            Column(key="method", header="Method", numeric=False, of=lambda row: row.method),
            Column(key="n", header="n", of=lambda row: 3),
            Column(key="small_dice", header="Dice", over="small", better="high", of=lambda row: row.dice),
            Column(key="small_fnr", header="FNR", over="small", better="low", of=lambda row: row.fnr),
            Column(key="gone", header="Gone", only_if=False, of=lambda row: "gone"),
        ),
        (
            Measured(method="u_net", dice=Number(0.71234567, 0.01), fnr=Number(0.2), group="ours"),
            Measured(method="<b>x</b>", dice=Number(0.9, 0.02), fnr=Number(0.1), group="ours", ranked=False),
            Measured(method="x_net", dice=Number(0.8), group="ours"),
            Measured(method="paper", dice=Number(0.877, 0.014, decimals=3), fnr=Number(0.078), group="theirs"),
        ),
        ("how to\nread",),
    )


def test_the_best_of_a_group_is_bold_and_what_does_not_compete_is_not(table: Table) -> None:
    bold = re.findall(r"<strong>(.*?)</strong>", to_html(table, 99))
    assert bold == ["0.8000"]  # 0.9 is unranked, FNR has one contestant left, the paper's group has one row
    assert re.findall(r"\\textbf\{(.*?)\}", to_latex(table)) == ["0.8000"]


def test_figures_that_look_alike_are_best_together() -> None:
    rows = [Measured(dice=Number(value)) for value in (0.80001, 0.80004, 0.7)]
    column = Column(key="d", header="D", better="high", of=lambda row: row.dice)
    html = to_html(Table.of("t", "c", [column], rows), 99)
    assert html.count("<strong>0.8000</strong>") == 2


def test_csv_holds_full_precision_and_sd_in_a_column_of_its_own(table: Table) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert list(rows[0]) == ["group", "method", "n", "small_dice", "small_dice_sd", "small_fnr"]
    assert float(rows[0]["small_dice"]) == 0.71234567
    assert rows[2]["small_fnr"] == rows[2]["small_dice_sd"] == ""


def test_html_escapes_every_text(table: Table) -> None:
    html = to_html(table, 99)
    assert "&lt;b&gt;x&lt;/b&gt;" in html
    assert "<b>" not in html


def test_every_latex_row_fills_the_columns_and_environments_close(table: Table) -> None:
    text = to_latex(table)
    spec = re.search(r"\\begin\{tabular\}\{(\w+)\}", text).group(1)
    assert spec == "lrrr"
    for line in (line for line in text.splitlines() if line.endswith(r"\\")):
        spans = [int(span) for span in re.findall(r"\\multicolumn\{(\d+)\}", line)]
        assert len(re.findall(r"(?<!\\)&", line)) + 1 - len(spans) + sum(spans) == len(spec)
    assert re.findall(r"\\begin\{(\w+)\}", text) == list(reversed(re.findall(r"\\end\{(\w+)\}", text)))
    assert [text.count(rule) for rule in (r"\toprule", r"\bottomrule", r"\cmidrule(lr){3-4}")] == [1, 1, 1]
    assert text.count("{") == text.count("}")


def test_latex_acts_on_no_character_of_the_text(table: Table) -> None:
    assert r"\caption{A\_caption \& 100 \%}" in to_latex(table)
    assert r"u\_net & 3 & 0.7123 $\pm$ 0.0100 & 0.2000 \\" in to_latex(table)
    assert latex("\\input{x}\n~^#$") == r"\textbackslash{}input\{x\} \textasciitilde{}\textasciicircum{}\#\$"
    assert to_latex(table).splitlines()[-1] == "% how to read"


def test_the_terminal_shows_every_figure_and_cuts_no_heading() -> None:
    heading = "this run, xbusnet, oracle (uses the ground-truth mask)"
    columns = (
        Column(key="fold", header="Fold", numeric=False, of=lambda row: row.method),
        Column(key="dice", header="Dice", of=lambda row: row.dice),
    )
    rows = [Measured(method="[red]0[/red]", dice=Number(0.5), group=heading)]
    console = rich.console.Console(width=60, file=io.StringIO())
    console.print(to_rich(Table.of("t", "c", columns, rows)))
    shown = console.file.getvalue()
    assert heading in shown
    assert "[red]0[/red]" in shown
    assert "0.5000" in shown
