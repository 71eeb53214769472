"""NUMBERS: everything a report says in figures, computed once (`summarise`) and kept as typed records (`Summary`).

scope → arms, comparisons → Summary → summary.json, tables, page
"""

from __future__ import annotations

from bushpc.report.summary.records import ArmSummary
from bushpc.report.summary.summarise import summarise
from bushpc.report.summary.summary import Result, Summary, read_summary

__all__ = ["ArmSummary", "Result", "Summary", "read_summary", "summarise"]
