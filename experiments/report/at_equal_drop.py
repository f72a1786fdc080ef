"""Tables of what each method keeps, and of how fast it is, at an equal drop of accuracy."""

from collections.abc import Callable

import pandas as pd

from experiments.report.markdown import NOT_MEASURED, markdown_table, spread
from experiments.report.size_ratios import EQUAL_DROPS
from experiments.report.sizes_at_drop import (
    Asked,
    Size,
    baseline_sizes,
    our_sizes,
    runs_of,
    sizes,
    smallest,
)
from experiments.report.tables import FRACTIONS, METHOD_TITLES, NETWORK_TITLES, in_order
from experiments.report.times_at_drop import over_seeds
from experiments.report.variants import (
    ALLOCATION_WORDS,
    LAYER_REFITS,
    NETWORK_REFIT,
    OURS,
    STEPS_OF_OURS,
    TODAYS_RIVALS,
    is_baseline,
)
from experiments.runs.records import ONE_TOLERANCE

_HEAD = """\
# At an equal drop of accuracy

Made by `python -m experiments.targets` from the tables in this folder; not edited by hand. Each
method is at the best of its variants (refit, order, allocation, samples, ridge), in per cent of the
dense fully connected layers. All layers are trained together, towards the original outputs and
without labels, in the tables that say so, and in no other. The drop is that on held-out samples;
sizes between those that were run are interpolated in their logarithm. A cell has the mean over
seeds, in brackets the range, and after the semicolon the drop on the test set, in points. The least
is in bold. *At most*: some seed's smallest network that was run is within the drop already. A
dagger marks what earlier code made, see [README.md](README.md). A dash: not run, or some seed is
never within the drop. This project's own methods come first. *Ours over the best baseline*: the
ratio, then both."""
_DAGGER = "†"
_DROPS = sorted(EQUAL_DROPS, reverse=True)
# Not a drop of accuracy, which is sought on the samples that the drop here is of.
_GOALS = (*ALLOCATION_WORDS, ONE_TOLERANCE)


def report(tables: dict[str, pd.DataFrame]) -> str:
    """All tables in Markdown: weights and bytes at each drop, then times, where they are there."""
    parts = [_HEAD]
    sweeps = tables.get("sweeps")
    if sweeps is not None:
        parts.append(f"## Ours over the best baseline\n\n{ratios_table(sweeps)}")
        for counted in FRACTIONS:
            for drop in _DROPS:
                parts.append(
                    f"## {_heading(counted, drop)}\n\n{sizes_table(sweeps, counted, drop)}"
                )
        for drop in _DROPS:
            table = sizes_table(sweeps, "weights", drop, (NETWORK_REFIT,))
            parts.append(f"## {_heading('weights', drop)}, all layers trained together\n\n{table}")
    times = tables.get("times_at_drop")
    if times is None:
        parts.append(f"## Times\n\n{NOT_MEASURED.capitalize()}.")
    else:
        parts += _times_parts(over_seeds(times))
    return "\n\n".join(parts) + "\n"


def _heading(counted: str, drop: float) -> str:
    return f"{counted.capitalize()} kept at a drop of {_points(drop)}"


def ratios_table(sweeps: pd.DataFrame) -> str:
    """Of each network, the least size of ours over the least of all baselines."""
    rows = []
    for model in in_order(sweeps["model"], NETWORK_TITLES):
        row = [NETWORK_TITLES.get(model, model)]
        for counted in FRACTIONS:
            for drop in _DROPS:
                row.append(_ratio(sweeps, Asked(model, drop, counted=counted)))
        rows.append(row)
    titles = [f"{counted}, {_points(drop)}" for counted in FRACTIONS for drop in _DROPS]
    return markdown_table(["", *titles], rows)


def _ratio(sweeps: pd.DataFrame, asked: Asked) -> str:
    ours, best = smallest(our_sizes(sweeps, asked)), smallest(baseline_sizes(sweeps, asked))
    if ours is None or best is None:
        return NOT_MEASURED
    own, rival = (
        f"{METHOD_TITLES.get(each.method, each.method)} {_marked(each, f'{100 * each.mean:.2f} %')}"
        for each in (ours, best)
    )
    return f"{ours.mean / best.mean:.2f}: {own}; {rival}"


def sizes_table(
    sweeps: pd.DataFrame, counted: str, drop: float, refits: tuple[str, ...] = LAYER_REFITS
) -> str:
    """The size of each method on each network, in per cent of the dense layers."""
    models = in_order(sweeps["model"], NETWORK_TITLES)
    asked = {model: Asked(model, drop, refits, counted) for model in models}
    of_model = {model: runs_of(sweeps, asked[model]) for model in models}

    def size(method: str, model: str) -> Size | None:
        runs = of_model[model]
        runs = runs[(runs["method"] == method) & runs["goal"].isin(_GOALS)]
        return smallest(sizes(runs, asked[model]))

    return _table(size, _in_order(sweeps), models, lambda each: each.mean, _size_in_words)


def _times_parts(times: pd.DataFrame) -> list[str]:
    parts = []
    for drop in sorted(times["largest_drop"].unique(), reverse=True):
        for batch in sorted(times["batch"].unique()):
            here = times[(times["largest_drop"] == drop) & (times["batch"] == batch)]
            rows = {(row.method, row.model): row for row in here.itertuples()}
            table = _table(
                lambda method, model, rows=rows: rows.get((method, model)),
                _in_order(here),
                in_order(here["model"], NETWORK_TITLES),
                lambda row: -row.speedup,
                lambda row: spread(row.speedup, row.low, row.high, 1),
            )
            title = f"Times as fast as the dense layers, batch {batch}, at a drop of"
            parts.append(f"## {title} {_points(drop)}\n\n{table}")
    return parts


def _table(
    cell_of: Callable, methods: list[str], models: list[str], order: Callable, in_words: Callable
) -> str:
    """Methods by networks; in bold where `order` is least, without methods that have no cell."""
    cells = {method: [cell_of(method, model) for model in models] for method in methods}
    cells = {method: row for method, row in cells.items() if any(each is not None for each in row)}
    columns = zip(*cells.values(), strict=True)
    least = [
        min((order(each) for each in column if each is not None), default=None)
        for column in columns
    ]
    rows = []
    for method, row in cells.items():
        words = [METHOD_TITLES.get(method, method)]
        for each, best in zip(row, least, strict=True):
            text = "-" if each is None else in_words(each)
            words.append(f"**{text}**" if each is not None and order(each) == best else text)
        rows.append(words)
    return markdown_table(["", *(NETWORK_TITLES.get(model, model) for model in models)], rows)


def _points(drop: float) -> str:
    return "1 point" if drop == 1 else f"{drop:g} points"


def _size_in_words(size: Size) -> str:
    text = spread(100 * size.mean, 100 * size.low, 100 * size.high, 2)
    return _marked(size, f"{text}; {size.test_drop:.2f}")


def _marked(size: Size, text: str) -> str:
    return f"{'at most ' if size.at_most else ''}{text}{_DAGGER if size.earlier else ''}"


def _in_order(rows: pd.DataFrame) -> list[str]:
    """Ours, from the last to the first, then today's rivals, then all others."""
    baselines = in_order(rows[is_baseline(rows)]["method"], [*TODAYS_RIVALS, *METHOD_TITLES])
    ours = [method for method in reversed(OURS) if (rows["method"] == method).any()]
    steps = [method for method in STEPS_OF_OURS if (rows["method"] == method).any()]
    return [*ours, *baselines, *steps]
