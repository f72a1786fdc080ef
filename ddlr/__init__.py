"""Data-driven low-rank compression of fully connected layers, with certified solves."""

from ddlr.allocate import compress_to_goal
from ddlr.capture import capture
from ddlr.certificate import Certificate, certify
from ddlr.compress import compress
from ddlr.input_selection import fewest_weights
from ddlr.inputs import CentredInputs
from ddlr.layers import LowRankLinear, SelectedLinear, compact
from ddlr.layerwise import CapturedLayers, capture_layers
from ddlr.low_rank import solve_low_rank
from ddlr.network_bound import output_bound
from ddlr.network_refit import refit_network
from ddlr.problem import WarmStart
from ddlr.rank_search import lowest_rank
from ddlr.reduced_rank import refit_low_rank
from ddlr.result import (
    CompressionResult,
    ConvergenceError,
    GoalReport,
    LayerReport,
    SolverResult,
    SolverStatus,
)

__all__ = [
    "CapturedLayers",
    "CentredInputs",
    "Certificate",
    "CompressionResult",
    "ConvergenceError",
    "GoalReport",
    "LayerReport",
    "LowRankLinear",
    "SelectedLinear",
    "SolverResult",
    "SolverStatus",
    "WarmStart",
    "capture",
    "capture_layers",
    "certify",
    "compact",
    "compress",
    "compress_to_goal",
    "fewest_weights",
    "lowest_rank",
    "output_bound",
    "refit_low_rank",
    "refit_network",
    "solve_low_rank",
]
