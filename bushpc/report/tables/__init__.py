"""Summary → tables: which rows and columns the report shows, and their labels. One file per table family.

All figures come from the summary, so the page, Markdown, CSV, LaTeX and `summary.json` can't contradict each other.
"""

from __future__ import annotations

from bushpc.report.scope import ReportScope
from bushpc.report.summary import Summary
from bushpc.report.table import Table
from bushpc.report.tables.ablation import ablation_table
from bushpc.report.tables.calibration import calibration_table
from bushpc.report.tables.classes import classes_table
from bushpc.report.tables.common import classes_of, folds_phrase, titled
from bushpc.report.tables.comparisons import comparison_table, fold_comparison_table, nemenyi_table
from bushpc.report.tables.cost import cost_table, time_table
from bushpc.report.tables.external import external_comparison_table, external_table
from bushpc.report.tables.folds import folds_table
from bushpc.report.tables.generators import generators_table
from bushpc.report.tables.headline import headline_table, overview_table
from bushpc.report.tables.labels import label_comparison_table, labels_table
from bushpc.report.tables.normals import normals_table
from bushpc.report.tables.postprocess import postprocess_table
from bushpc.report.tables.provenance import cells_table, settings_table, shards_table
from bushpc.report.tables.rivals import rivals_table
from bushpc.report.tables.sources import difference_table, sources_table
from bushpc.report.tables.strata import strata_table
from bushpc.shards.manifest import Manifest

__all__ = ["all_tables", "classes_of", "folds_phrase", "folds_table", "overview_table", "titled"]


def all_tables(scope: ReportScope, summary: Summary, manifest: Manifest | None) -> dict[str, Table]:
    """Every table of the report by name, in order; tables without content are left out."""
    tables = [
        headline_table(summary),
        generators_table(scope),
        rivals_table(summary),
        classes_table(summary),
        ablation_table(summary),
        comparison_table(summary),
        fold_comparison_table(summary),
        nemenyi_table(summary),
        external_table(summary),
        external_comparison_table(summary),
        labels_table(summary),
        label_comparison_table(summary),
        normals_table(summary),
        sources_table(summary),
        folds_table(summary),
        postprocess_table(summary),
        strata_table(summary),
        calibration_table(summary),
        difference_table(summary),
        cost_table(summary),
        time_table(scope),
        cells_table(scope),
        settings_table(scope),
        shards_table(manifest),
    ]
    return {table.name: table for table in tables if table is not None}
