"""What is aimed at with the solvers, and whether the table of their benchmark says it is met."""

import pandas as pd

# As `benchmark_targets.csv` has them.
SUM_OF_STRUCTURES = "trained layer, low rank plus sparse, convex: pairs"
ONE_RANK = "lowest rank of a trained layer: pairs for one rank"
RANK_SEARCH = "lowest rank of a trained layer: pairs for the whole search, at the slowest tolerance"


def solver_targets(table: pd.DataFrame) -> pd.DataFrame:
    """The targets that were measured: what is aimed at, what was measured, whether it was met."""
    measured = [target for target in _all_targets(table) if target["measured"] is not None]
    for target in measured:
        above, limit = target.pop("at_least", None), target.pop("at_most", None)
        met = target["measured"] >= above if limit is None else target["measured"] <= limit
        target["target"] = f">= {above:g}" if limit is None else f"<= {limit:g}"
        prefix = "> " if target.pop("unfinished", False) else ""
        target["measured"] = f"{prefix}{target['measured']:.3g}"
        target["met"] = "yes" if met else "no"
    return pd.DataFrame(measured, columns=["what", "target", "measured", "met"])


def _all_targets(table: pd.DataFrame) -> list[dict]:
    def value(column: str, **choice) -> float | None:
        rows = table
        for key, chosen in choice.items():
            rows = rows[rows[key] == chosen] if key in rows else rows.iloc[:0]
        return rows[column].iloc[-1] if len(rows) and column in rows else None

    def ratio(above: float | None, below: float | None) -> float | None:
        return None if above is None or below is None else above / below

    def speedup(solver: str, size: int, samples: int) -> float | None:
        case = {"part": "reference", "case": solver, "in_features": size, "samples": samples}
        return ratio(
            value("seconds", solver=solver, **case), value("seconds", solver="ours", **case)
        )

    targets = [
        {
            "what": "100 x 100, 1000 samples, gap 1e-4: times as fast as SCS",
            "measured": speedup("SCS", 100, 1000),
            "at_least": 200,
        },
        {
            "what": "50 x 50, 200 samples, gap 1e-6: times as fast as Clarabel",
            "measured": speedup("CLARABEL", 50, 200),
            "at_least": 500,
        },
    ]
    for norm, most in (("nuclear", 200), ("l1", 160)):
        case = {"part": "layer", "case": "solve", "norm": norm}
        seconds = value("seconds", solver="ours", **case)
        pair = value("pair_seconds", solver="ours", **case)
        pairs = ratio(seconds, pair)
        alone, path = (
            value("seconds", part="path", case=name, norm=norm) for name in ("one", "path of 8")
        )
        plain = _better_plain(table, norm)
        targets += [
            {"what": f"trained layer, {norm}: pairs", "measured": pairs, "at_most": most},
            {
                "what": f"trained layer, {norm}: pairs an iteration, checks included",
                "measured": ratio(_seconds_per_iteration(table, norm), pair),
                "at_most": 1.6,
            },
            {
                "what": f"trained layer, {norm}: times as fast as the better plain method",
                "measured": ratio(plain["seconds"], seconds),
                "unfinished": plain["status"] != "converged",
                "at_least": 10,
            },
            {
                "what": f"path of 8 tolerances, {norm}: times one solve",
                "measured": ratio(path, alone),
                "at_most": 3,
            },
            {
                "what": f"peak memory, {norm}: times inputs and targets",
                "measured": ratio(
                    value("peak_bytes", part="memory", norm=norm),
                    value("data_bytes", part="memory", norm=norm),
                ),
                "at_most": 4,
            },
        ]
    one_rank, searches = (
        _pairs(table, part="lowest_rank", case=case) for case in ("one rank", "search")
    )
    sums = _pairs(table, part="sum", case="solve")
    return [
        *targets,
        {"what": SUM_OF_STRUCTURES, "measured": max(sums, default=None), "at_most": 300},
        {"what": ONE_RANK, "measured": max(one_rank, default=None), "at_most": 12},
        {"what": RANK_SEARCH, "measured": max(searches, default=None), "at_most": 50},
        {
            "what": "VGG-16 head, layer 1, nuclear: seconds",
            "measured": value("seconds", part="large", norm="nuclear", in_features=25088),
            "at_most": 120,
        },
    ]


def _pairs(table: pd.DataFrame, part: str, case: str) -> list[float]:
    """The time of each row of a case, in pairs."""
    rows = table[(table["part"] == part) & (table["case"] == case)]
    return list(rows["seconds"] / rows["pair_seconds"]) if len(rows) else []


def _seconds_per_iteration(table: pd.DataFrame, norm: str) -> float | None:
    """The seconds per iteration between the first and last point of the trace, without set-up."""
    trace = table[(table["part"] == "layer") & (table["case"] == "trace")]
    trace = trace[(trace["norm"] == norm) & (trace["solver"] == "ours")]
    if trace["iterations"].nunique() < 2:
        return None
    first, last = trace.iloc[0], trace.iloc[-1]
    return (last["seconds"] - first["seconds"]) / (last["iterations"] - first["iterations"])


def _better_plain(table: pd.DataFrame, norm: str) -> dict:
    """The plain method's run that was done first, or none."""
    runs = table[(table["part"] == "layer") & (table["case"] == "solve") & (table["norm"] == norm)]
    runs = runs[runs["solver"].str.startswith("plain")].sort_values(["status", "seconds"])
    return runs.iloc[0].to_dict() if len(runs) else {"seconds": None, "status": "converged"}
