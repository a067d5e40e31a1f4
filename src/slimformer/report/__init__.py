"""Show a plan and what was measured with it: tables for a terminal, one HTML page for everybody else."""

from slimformer.report.elastic import grid_picture, grid_table
from slimformer.report.elimination import curve_table, predictor_table
from slimformer.report.narrow import narrow_table
from slimformer.report.optimization.curve import optimize_curve
from slimformer.report.optimization.table import optimize_table
from slimformer.report.optimization.using import uses_of
from slimformer.report.page import plan_page
from slimformer.report.panel import panel_table
from slimformer.report.repair import repair_table
from slimformer.report.routing import router_table
from slimformer.report.tables import comparison_table, methods_table, plan_table
from slimformer.report.temperature import temperature_table

__all__ = [
    "comparison_table",
    "curve_table",
    "grid_picture",
    "grid_table",
    "methods_table",
    "narrow_table",
    "optimize_curve",
    "optimize_table",
    "panel_table",
    "plan_page",
    "plan_table",
    "predictor_table",
    "repair_table",
    "router_table",
    "temperature_table",
    "uses_of",
]
