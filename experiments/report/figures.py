"""Every figure of the comparison and of the ablation, each a function of the tables.

Needs neither torch nor a network. A function returns None where the tables hold no rows for its
figure. Lines are means over seeds, bars the range over them.
"""

from collections.abc import Callable

from matplotlib.figure import Figure

from experiments.report.figures_ablation import ablation
from experiments.report.figures_equal_drop import equal_drop
from experiments.report.figures_frontier import frontier, frontier_goals
from experiments.report.figures_inference import inference
from experiments.report.figures_layers import bound, layers
from experiments.report.figures_settings import order, samples
from experiments.report.figures_spectrum import spectrum
from experiments.report.figures_time import times_at_drop

# Name of a file to its function and the tables that this takes, in the order of its arguments.
FIGURES: dict[str, tuple[Callable[..., Figure | None], tuple[str, ...]]] = {
    "frontier_weights": (lambda sweeps: frontier(sweeps, "weights"), ("sweeps",)),
    "frontier_bytes": (lambda sweeps: frontier(sweeps, "bytes"), ("sweeps",)),
    "best_weights": (lambda sweeps: frontier_goals(sweeps, "weights"), ("sweeps",)),
    "best_bytes": (lambda sweeps: frontier_goals(sweeps, "bytes"), ("sweeps",)),
    "equal_drop": (equal_drop, ("sizes",)),
    "layers": (layers, ("sweeps", "layers")),
    "bound": (bound, ("sweeps", "layers")),
    "samples": (samples, ("sweeps", "layers")),
    "order": (order, ("sweeps",)),
    "inference": (inference, ("inference",)),
    "times_at_drop": (times_at_drop, ("times_at_drop",)),
    "spectrum": (spectrum, ("spectrum",)),
    "ablation": (ablation, ("ablation",)),
}
