"""Reports on stored runs: tables, figures, one self-contained page. Imports no training code."""

from airtune.report.cells import render_table
from airtune.report.load import load_run, load_runs, load_summary
from airtune.report.page import write_compare_report, write_report, write_run_report
from airtune.report.plan_page import write_plan_page
from airtune.report.records import CompareSummary, Run
from airtune.report.tables import compare_summary, write_compare_files
from airtune.report.tensorboard import write_event_files

__all__ = [
    "CompareSummary",
    "Run",
    "compare_summary",
    "load_run",
    "load_runs",
    "load_summary",
    "render_table",
    "write_compare_files",
    "write_compare_report",
    "write_event_files",
    "write_plan_page",
    "write_report",
    "write_run_report",
]
