"""What the command line prints: tables for people, JSON for machines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddlr.files import FileInfo

_HEADINGS = ("layer", "inputs", "outputs", "form", "rank", "weights", "kept", "error", "status")


def layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    """One line for each layer's report, and one for all of them."""
    rows = [_HEADINGS, *(_row(each) for each in layers)]
    kept, dense = (
        sum(each[name] for each in layers) for name in ("parameters_kept", "parameters_dense")
    )
    rows.append(("all", "", "", "", "", str(kept), _share(kept, dense), "", ""))
    widths = [max(len(row[place]) for row in rows) for place in range(len(_HEADINGS))]
    words = {0, 3, 8}  # to the left; numbers to the right
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in words else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = (layer["in_features"], layer["out_features"])
    kept, dense = layer["parameters_kept"], layer["parameters_dense"]
    error = layer["relative_error_read"]
    return (
        layer["name"] or "(the network)",
        *(str(each) for each in numbers),
        layer["form"],
        str(layer["rank"]),
        str(kept),
        _share(kept, dense),
        "" if error is None else f"{error:.3f}",
        str(layer["status"]),
    )


def _share(kept: int, dense: int) -> str:
    return f"{100 * kept / dense:.1f} %" if dense else ""


def goal_line(goal: Mapping[str, Any]) -> str:
    """How a goal is met, in one line."""
    interval = goal["interval"]
    between = "" if interval is None else f", between {interval[0]:.3g} and {interval[1]:.3g}"
    said = "met" if goal["met"] else "NOT met"
    return (
        f"goal {said}: {goal['name']} {goal['wanted']:g}, measured {goal['measured']:.4g}{between}"
    )


def size_line(size: int) -> str:
    """A size as people read it."""
    for unit, bytes_each in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.1f} {unit}"
    return f"{size} bytes"


def as_json(path: Path, info: FileInfo) -> dict[str, Any]:
    return {
        "file": str(path),
        "bytes": info.bytes,
        "library_version": info.library_version,
        "layers": list(info.layers),
        "goal": info.goal,
    }
