"""CSV → TABLES: what a run directory says, as numbers, tables, figures and one page. Last room of the way.

    run folders ─results→ checked frames ─scope→ arms ─stats, summary→ numbers ─tables, figures, pictures→ page

Only files are read: no model, no torch, no scheduler. So a report can be written on a login node, for a run
that another machine trained, and again years later.
"""

from bushpc.report.page import ReportResult, build_comparison, build_report

__all__ = ["ReportResult", "build_comparison", "build_report"]
