"""Summary → tables: which rows and columns the report shows, and how each is labelled. Figures come from the
summary alone, so page, Markdown, CSV, LaTeX and `summary.json` cannot disagree.
"""

from __future__ import annotations

from bushpc.report.content.ablation import ablation_table
from bushpc.report.content.calibration import calibration_table
from bushpc.report.content.classes import classes_table
from bushpc.report.content.common import Summary, classes_of, folds_phrase, several, titled
from bushpc.report.content.comparisons import comparison_table, fold_comparison_table, nemenyi_table
from bushpc.report.content.cost import cost_table, time_table
from bushpc.report.content.external import external_comparison_table, external_table
from bushpc.report.content.folds import folds_table
from bushpc.report.content.headline import headline_table, overview_table
from bushpc.report.content.labels import label_comparison_table, labels_table, normals_table
from bushpc.report.content.provenance import cells_table, differences_table, shards_table
from bushpc.report.content.sources import difference_table, sources_table
from bushpc.report.content.strata import strata_table
from bushpc.report.study import Study
from bushpc.report.tables import Table
from bushpc.shards.manifest import Manifest

__all__ = ["Summary", "all_tables", "classes_of", "folds_phrase", "folds_table", "overview_table", "several", "titled"]


def all_tables(study: Study, summary: Summary, manifest: Manifest | None) -> dict[str, Table]:
    """Every table of the report by name, in its order; those that there is nothing to say in are left out."""
    tables = [
        headline_table(summary),
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
        strata_table(summary),
        calibration_table(summary),
        difference_table(summary),
        cost_table(summary),
        time_table(study),
        cells_table(study),
        differences_table(study),
        shards_table(manifest),
    ]
    return {table.name: table for table in tables if table is not None}
