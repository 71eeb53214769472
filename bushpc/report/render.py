"""A table as HTML for the page, Markdown for a message, CSV for scripts, booktabs LaTeX for the paper, rich for the
terminal. Nothing is computed or rounded here.
"""

from __future__ import annotations

import csv
import io

import rich.box
import rich.console
import rich.table
import rich.text
from markupsafe import Markup, escape

from bushpc.report.table import Column, Number, Row, Table, Value, bold_cells, shown


def to_html(table: Table, most: int) -> Markup:
    """A `<table>` with header scopes, of the first `most` rows; every text is escaped."""
    parts = [Markup("<table>"), _html_head(table)]
    for group, rows in table.head(most).groups():
        bold = bold_cells(table, rows)
        parts.append(Markup("<tbody>"))
        if group:
            heading = Markup('<tr class="group"><th colspan="{}" scope="rowgroup"><span>{}</span></th></tr>')
            parts.append(heading.format(len(table.columns), group))
        parts.extend(_html_row(table, row, {j for i, j in bold if i == position}) for position, row in enumerate(rows))
        parts.append(Markup("</tbody>"))
    parts.append(Markup("</table>"))
    return Markup("\n").join(parts)


def _html_head(table: Table) -> Markup:
    lines = []
    if any(column.over for column in table.columns):
        tags = {True: Markup('<th colspan="{}" scope="colgroup">{}</th>'), False: Markup('<td colspan="{}">{}</td>')}
        cells = (tags[bool(over)].format(span, over) for over, span in table.overs())
        lines.append(Markup('<tr class="over">{}</tr>').format(Markup("").join(cells)))
    cells = (Markup('<th scope="col"{}>{}</th>').format(_html_class(column), column.header) for column in table.columns)
    lines.append(Markup("<tr>{}</tr>").format(Markup("").join(cells)))
    return Markup("<thead>{}</thead>").format(Markup("").join(lines))


def _html_row(table: Table, row: Row, bold: set[int]) -> Markup:
    cells = []
    for j, (column, value) in enumerate(zip(table.columns, row.values, strict=True)):
        text = Markup("<strong>{}</strong>").format(shown(value)) if j in bold else escape(shown(value))
        tag = Markup('<th scope="row"{}>{}</th>') if j == 0 else Markup("<td{}>{}</td>")
        cells.append(tag.format(_html_class(column), text))
    names = " ".join(name for name, on in (("strong", row.strong), ("quoted", row.quoted)) if on)
    return Markup("<tr{}>{}</tr>").format(Markup(' class="{}"').format(names) if names else "", Markup("").join(cells))


def _html_class(column: Column) -> Markup:
    kind = "number" if column.numeric else "text"
    return Markup(' class="{}"').format(f"{kind} quoted" if column.quoted else kind)


def to_csv(table: Table) -> str:
    """Header and rows for machines: figures at full precision, SD in a column of its own, no figure left blank
    by rounding; a group's heading becomes the first column.
    """
    with_sd = {
        j
        for row in table.rows
        for j, value in enumerate(row.values)
        if isinstance(value, Number) and value.sd is not None
    }
    header = ["group"]
    for j, column in enumerate(table.columns):
        header += [column.key, f"{column.key}_sd"] if j in with_sd else [column.key]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        line: list[str] = [row.group]
        for j, value in enumerate(row.values):
            line.append(_csv_value(value))
            if j in with_sd:
                line.append(_csv_number(value.sd) if isinstance(value, Number) else "")
        writer.writerow(line)
    return out.getvalue()


def _csv_value(value: Value) -> str:
    if isinstance(value, Number):
        return _csv_number(value.value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _csv_number(value: float | None) -> str:
    return "" if value is None else repr(value)


def to_latex(table: Table) -> str:
    """A `table` float for a document that loads booktabs, and amssymb for ticks; notes stand below as comments."""
    spec = "".join("r" if column.numeric else "l" for column in table.columns)
    lines = [
        r"% \usepackage{booktabs}  % and amssymb for ticks",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(table.caption)}}}",
    ]
    lines += [rf"\label{{tab:{table.name}}}", rf"\begin{{tabular}}{{{spec}}}", r"\toprule", *_latex_head(table)]
    for group, rows in table.groups():
        bold = bold_cells(table, rows)
        lines.append(r"\midrule")
        if group:
            lines.append(rf"\multicolumn{{{len(table.columns)}}}{{l}}{{\emph{{{latex(group)}}}}} \\")
        for i, row in enumerate(rows):
            cells = [_latex_bold(latex(shown(value)), (i, j) in bold) for j, value in enumerate(row.values)]
            lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    lines += [f"% {' '.join(note.split())}" for note in table.notes]
    return "\n".join(lines) + "\n"


def _latex_head(table: Table) -> list[str]:
    lines = []
    if any(column.over for column in table.columns):
        cells, rules, start = [], [], 1
        for over, span in table.overs():
            cells.append(rf"\multicolumn{{{span}}}{{c}}{{{latex(over)}}}")
            if over:
                rules.append(rf"\cmidrule(lr){{{start}-{start + span - 1}}}")
            start += span
        lines += [" & ".join(cells) + r" \\", " ".join(rules)]
    return [*lines, " & ".join(latex(column.header) for column in table.columns) + r" \\"]


def _latex_bold(text: str, bold: bool) -> str:
    return rf"\textbf{{{text}}}" if bold else text


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "\u2212": r"$-$", "\u2013": "--", "—": "---",
    "✓": r"$\checkmark$", "χ": r"$\chi$", "\u00a0": "~", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "²": r"$^2$",
    "<": r"\textless{}", ">": r"\textgreater{}", "“": "``", "”": "''", "\n": " ", "\r": " ",
}  # fmt: skip


def latex(text: str) -> str:
    """Text with every character that LaTeX would act upon made harmless."""
    return "".join(_LATEX.get(character, character) for character in text)


def to_markdown(table: Table, most: int) -> str:
    """A pipe table of the first `most` rows, as GitHub, GitLab and pandoc read it; groups are rows of their own."""
    heads = [markdown(f"{column.over}: {column.header}" if column.over else column.header) for column in table.columns]
    lines = [f"### {markdown(table.caption)}", "", _pipes(heads)]
    lines.append(_pipes(["---:" if column.numeric else ":---" for column in table.columns]))
    for group, rows in table.head(most).groups():
        bold = bold_cells(table, rows)
        if group:
            lines.append(_pipes([f"*{markdown(group)}*", *[""] * (len(table.columns) - 1)]))
        for i, row in enumerate(rows):
            texts = [markdown(shown(value)) for value in row.values]
            lines.append(
                _pipes([f"**{text}**" if (i, j) in bold or row.strong else text for j, text in enumerate(texts)])
            )
    notes = [*table.notes, *table.cut(most)]
    return "\n".join([*lines, "", *(f"- {markdown(note)}" for note in notes), ""])


def _pipes(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|#"} | {"<": "&lt;", ">": "&gt;", "\n": " ", "\r": " "})


def markdown(text: str) -> str:
    """Text with every character that Markdown or HTML would act upon made harmless."""
    return text.translate(_MARKDOWN)


def to_rich(table: Table) -> rich.console.Group:
    """For the terminal, a table per group so that no heading is cut on a narrow one.

    `Text` cells, so that a name with square brackets is not taken for markup.
    """
    parts: list[rich.console.RenderableType] = [rich.text.Text(table.caption, style="bold")]
    for group, rows in table.groups():
        bold = bold_cells(table, rows)
        lines = rich.table.Table(box=rich.box.SIMPLE_HEAD)
        for column in table.columns:
            header = rich.text.Text(f"{column.over} {column.header}".strip())
            lines.add_column(header, justify="right" if column.numeric else "left")
        for i, row in enumerate(rows):
            style = "bold" if row.strong else "dim" if row.quoted else ""
            values = enumerate(row.values)
            lines.add_row(*(rich.text.Text(shown(v), style="bold" if (i, j) in bold else style) for j, v in values))
        parts += [rich.text.Text(group, style="italic"), lines]
    return rich.console.Group(*parts)
