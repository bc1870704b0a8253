from airtune.report.cells import render_table
from airtune.report.load import CompareSummary, Run, load_run, load_runs, load_summary
from airtune.report.tables import compare_summary, write_compare_files

__all__ = [
    "CompareSummary",
    "Run",
    "compare_summary",
    "load_run",
    "load_runs",
    "load_summary",
    "render_table",
    "write_compare_files",
]
