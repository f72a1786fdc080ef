"""Data-driven low-rank compression of fully connected layers, with certified solves."""

from ddlr.captured import CapturedLayers
from ddlr.capturing import capture_layers
from ddlr.certificate import Certificate, certify
from ddlr.chains import fuse_chains
from ddlr.compacting import compact
from ddlr.compression import compress
from ddlr.convolution_forms import LowRankConvolution, PivotedConvolution, SeparableConvolution
from ddlr.export import to_onnx
from ddlr.files import load, save
from ddlr.goals import Goal
from ddlr.hooks import capture
from ddlr.input_selection import fewest_weights
from ddlr.inputs import CentredInputs
from ddlr.latency import Latency
from ddlr.layers import (
    LowRankLinear,
    PivotedLinear,
    SelectedLinear,
    SparseFactors,
    SparseLinear,
    SparsePlusLowRank,
)
from ddlr.low_rank import solve_low_rank
from ddlr.method import Method
from ddlr.network import Settings, compress_network
from ddlr.network_bound import output_bound
from ddlr.network_refit import NetworkRefit, refit_network
from ddlr.problem import WarmStart
from ddlr.rank_search import lowest_rank
from ddlr.reduced_rank import refit_low_rank
from ddlr.result import (
    CompressionResult,
    ConvergenceError,
    GoalReport,
    LayerReport,
    SkippedStatus,
    SkippedWeights,
    SolverResult,
    SolverStatus,
)

__all__ = [
    "CapturedLayers",
    "CentredInputs",
    "Certificate",
    "CompressionResult",
    "ConvergenceError",
    "Goal",
    "GoalReport",
    "Latency",
    "LayerReport",
    "LowRankConvolution",
    "LowRankLinear",
    "Method",
    "NetworkRefit",
    "PivotedConvolution",
    "PivotedLinear",
    "SelectedLinear",
    "SeparableConvolution",
    "Settings",
    "SkippedStatus",
    "SkippedWeights",
    "SolverResult",
    "SolverStatus",
    "SparseFactors",
    "SparseLinear",
    "SparsePlusLowRank",
    "WarmStart",
    "capture",
    "capture_layers",
    "certify",
    "compact",
    "compress",
    "compress_network",
    "fewest_weights",
    "fuse_chains",
    "load",
    "lowest_rank",
    "output_bound",
    "refit_low_rank",
    "refit_network",
    "save",
    "solve_low_rank",
    "to_onnx",
]
