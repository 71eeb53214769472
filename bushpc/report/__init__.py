"""CSV → TABLES: the results in a run folder as numbers, tables, figures and one page.

    run folders ─results→ checked frames ─scope→ arms ─stats, summary→ numbers ─tables, figures, pictures→ page

The report only reads files and needs no model, no torch and no scheduler. So it can be written on a login node, for a
run that was trained on another machine, and again years later.
"""

from bushpc.report.page import ReportResult, build_comparison, build_report

__all__ = ["ReportResult", "build_comparison", "build_report"]
