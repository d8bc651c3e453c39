"""What simulations found, for people: a table for the terminal, a page for the browser, plots, and a few sentences.

Owns how results are grouped and shown. Reads results only; runs nothing.
"""

from __future__ import annotations

from starmesh.sim.report.intervals import Interval
from starmesh.sim.report.page import page
from starmesh.sim.report.plots import goodput_plot, line_plot, tpot_plot
from starmesh.sim.report.summary import METRICS, Cell, Metric, Summary, metric, summarise
from starmesh.sim.report.table import table
from starmesh.sim.report.words import conclusions

__all__ = [
    "METRICS",
    "Cell",
    "Interval",
    "Metric",
    "Summary",
    "conclusions",
    "goodput_plot",
    "line_plot",
    "metric",
    "page",
    "summarise",
    "table",
    "tpot_plot",
]
