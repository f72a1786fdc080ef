"""The command `ddlr`: compress a network from files to a file, look into one, export one."""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ddlr.cli_inputs import (
    UsageError,
    as_calibration,
    as_held_out,
    built,
    few,
    method_of,
    methods,
    read_samples,
    with_weights,
)
from ddlr.cli_tables import as_json, goal_line, layer_table, size_line
from ddlr.export import to_onnx
from ddlr.files import load, read_info, save
from ddlr.goals import ON_HELD_OUT, Goal
from ddlr.network import Settings, compress_network
from ddlr.result import CompressionResult, ConvergenceError

DONE, NOT_MET, WRONG = 0, 1, 2

_EXAMPLE = """\
example:
  Write your trained weights and some hundred inputs to files, in Python:

    safetensors.torch.save_model(network, "model.safetensors")
    numpy.savez("samples.npz", inputs=inputs)
    numpy.savez("held_out.npz", inputs=other_inputs, labels=labels)

  With a function build() in mynet.py that returns the network with any weights:

    ddlr compress model.safetensors --factory mynet:build --calibration samples.npz \\
        --max-accuracy-drop 0.5 --held-out held_out.npz --method fewest_weights \\
        --out small.safetensors
    ddlr info small.safetensors
    ddlr export small.safetensors --factory mynet:build --example samples.npz --onnx small.onnx

exit status:
  0 done; 1 a goal was not met, a solve failed, or an export gives something else; 2 the command or
  a file is wrong
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with arguments, those of the process unless given; the exit status."""
    given = _parser().parse_args(arguments)
    with _Messages(given.command):
        try:
            return given.run(given)
        except ConvergenceError as error:
            return _said(given, error, NOT_MET)
        except (UsageError, OSError, ValueError, TypeError, ImportError) as error:
            return _said(given, error, WRONG)


def _said(given: argparse.Namespace, error: Exception, status: int) -> int:
    print(f"ddlr {given.command}: {error}", file=sys.stderr)
    return status


class _Messages:
    """Warnings of the library on stderr, and on a terminal a line for each solved layer."""

    def __init__(self, command: str):
        self.handler = logging.StreamHandler()
        self.handler.setFormatter(logging.Formatter(f"ddlr {command}: %(message)s"))
        self.handler.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
        self.log = logging.getLogger("ddlr")

    def __enter__(self) -> None:
        self.before = self.log.level, self.log.propagate
        self.log.addHandler(self.handler)
        self.log.setLevel(self.handler.level)
        self.log.propagate = False

    def __exit__(self, *_) -> None:
        self.log.removeHandler(self.handler)
        self.log.level, self.log.propagate = self.before


# --- the commands ----------------------------------------------------------------------------


def compress_command(given: argparse.Namespace) -> int:
    """Compress a network, write it, and print a table."""
    _check_writable(given.out, "--out", given.force)
    started = time.perf_counter()
    model = with_weights(built(given.factory), given.weights)
    inputs, _ = read_samples(given.calibration, "--calibration", model)
    wanted = _wanted(given, model)
    result = compress_network(
        model,
        as_calibration(inputs),
        method_of(given.method).with_options(constraint=given.constraint),
        refit=given.refit,
        order=given.order,
        layers=given.layer,
        output=given.output_kind,
        settings=Settings(ridge=given.ridge, workers=given.workers),
        **wanted,
    )
    save(result, given.out)
    seconds = time.perf_counter() - started
    _print_result(given, model, result, seconds)
    return DONE if result.goal is None or result.goal.met else NOT_MET


def _wanted(given: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """The tolerance or the goal, as keywords of `compress_network`."""
    if given.relative_tolerance is not None:
        if given.held_out is not None:
            raise UsageError("--held-out is for a goal that is measured on it")
        return {"relative_tolerance": given.relative_tolerance}
    name = next(each for each in _GOALS if getattr(given, each) is not None)
    held_out = None
    if name in ON_HELD_OUT and given.held_out is None:
        raise UsageError(f"{_option(name)} is measured on held-out samples; give --held-out")
    if given.held_out is not None:
        held_out = as_held_out(*read_samples(given.held_out, "--held-out", model))
    return {"goal": Goal(**{name: getattr(given, name)}, held_out=held_out)}


def _print_result(
    given: argparse.Namespace, model: nn.Module, result: CompressionResult, seconds: float
) -> None:
    info = read_info(given.out)
    before = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    if given.json:
        more = {"bytes_before": before, "seconds": round(seconds, 3)}
        print(json.dumps(as_json(given.out, info) | more))
        return
    print(layer_table(info.layers))
    if info.goal is not None:
        print(goal_line(info.goal))
    print(f"{given.out}: {size_line(info.bytes)}, in place of {size_line(before)}")


def info_command(given: argparse.Namespace) -> int:
    """Print what a file says of the network in it."""
    info = read_info(given.file)
    if given.json:
        print(json.dumps(as_json(given.file, info)))
        return DONE
    print(f"{given.file}: {size_line(info.bytes)}, by version {info.library_version}")
    if info.layers:
        print(layer_table(info.layers))
    else:
        print("no reports: a network was saved, not a result")
    if info.goal is not None:
        print(goal_line(info.goal))
    return DONE


def export_command(given: argparse.Namespace) -> int:
    """Write the network of a file as ONNX."""
    _check_writable(given.onnx, "--onnx", given.force)
    model = load(given.file, built(given.factory) if given.factory else None)
    inputs, _ = read_samples(given.example, "--example", model)
    try:
        to_onnx(model, few(inputs, 8), given.onnx, dynamic_batch=not given.fixed_batch)
    except RuntimeError as error:
        return _said(given, error, NOT_MET)
    print(f"{given.onnx}: {size_line(given.onnx.stat().st_size)}")
    return DONE


def _check_writable(path: Path, option: str, force: bool) -> None:
    """Refuse a file that is there or can not be written, before anything is computed."""
    if path.exists() and (not force or not path.is_file()):
        advice = "; --force replaces it" if path.is_file() else ""
        raise UsageError(f"{option} {path}: it is there already{advice}")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path}: the folder {path.parent} can not be written to")


# --- options ---------------------------------------------------------------------------------

_GOALS = {
    "max_accuracy_drop": (float, "POINTS", "lose at most so many points of accuracy on --held-out"),
    "min_agreement": (float, "SHARE", "predict the same on at least this share of --held-out"),
    "kept_fraction": (float, "SHARE", "keep at most this share of the layers' weights"),
    "max_parameters": (int, "NUMBER", "keep at most so many weights in the layers"),
    "max_output_error": (float, "SHARE", "move the outputs by at most this share of their norm"),
}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddlr",
        description="Make trained networks smaller without retraining them.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run, summary: str, description: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=summary,
            description=f"{summary.capitalize()}. {description}",
            epilog="ddlr --help has an example.",
            allow_abbrev=False,
        )
        made.set_defaults(run=run)
        return made

    _add_compress_options(
        command(
            "compress",
            compress_command,
            "compress a network to a file",
            "Says what is wanted by one of the goals or by --relative-tolerance. Samples are .npz "
            "files: an array 'inputs', or several arrays that are keyword arguments of the "
            "network, and 'labels'.",
        )
    )
    info = command("info", info_command, "say what is in a compressed file", "")
    info.add_argument("file", type=Path, metavar="small.safetensors")
    info.add_argument("--json", action="store_true", help="print JSON, for machines")
    export = command(
        "export",
        export_command,
        "export a compressed file to ONNX",
        "The result is run by ONNX Runtime and compared before it is kept.",
    )
    export.add_argument("file", type=Path, metavar="small.safetensors")
    export.add_argument("--onnx", type=Path, required=True, metavar="FILE", help="file to write")
    export.add_argument(
        "--example", type=Path, required=True, metavar="NPZ", help="some inputs, as for compress"
    )
    _add_factory(export, "; needed unless all its modules are plain ones of torch.nn", False)
    export.add_argument(
        "--fixed-batch",
        action="store_true",
        help="for a network that takes no other number of samples than --example has, up to 8",
    )
    _add_force(export)
    return parser


def _add_compress_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("weights", type=Path, metavar="model.safetensors", help="weights of the trained network")
    _add_factory(parser, "", True)
    add(
        "--calibration",
        type=Path,
        required=True,
        metavar="NPZ",
        help="some hundred to some thousand network inputs, without labels",
    )
    add("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    goals = parser.add_argument_group("what is wanted, one of").add_mutually_exclusive_group(
        required=True
    )
    for name, (kind, metavar, text) in _GOALS.items():
        goals.add_argument(_option(name), type=kind, metavar=metavar, help=text)
    goals.add_argument(
        "--relative-tolerance",
        type=float,
        metavar="SHARE",
        help="let each layer's output move by at most this share of its norm",
    )
    add("--held-out", type=Path, metavar="NPZ", help="samples that are not in --calibration")
    add(
        "--method",
        choices=sorted(methods()),
        default="nuclear",
        help="how layers are compressed: low-rank with a proof (nuclear), of the lowest rank "
        "found, with the fewest weights found, or sparse (nettrim) (default: %(default)s)",
    )
    add(
        "--refit",
        choices=("none", "layer", "network"),
        default="none",
        help="move each solved layer to a smaller error, or also train all of them together "
        "towards the original outputs (default: %(default)s)",
    )
    add(
        "--order",
        choices=("parallel", "cascade"),
        default="parallel",
        help="solve layers on the original network's activations, or on those of the compressed "
        "layers before (default: %(default)s)",
    )
    add("--constraint", choices=("nettrim", "hinge"), help="output set of nuclear and nettrim")
    add(
        "--layer",
        action="append",
        metavar="NAME",
        help="a layer to compress; may be given several times (default: all)",
    )
    add(
        "--output-kind",
        choices=("classes", "binary", "values"),
        help="what the network's outputs are, if that is not plain from the labels",
    )
    add("--ridge", type=float, help="1 where there are few samples for each input (default: 0.01)")
    add("--workers", type=int, default=1, help="processes that solve layers side by side")
    add("--json", action="store_true", help="print JSON, for machines")
    _add_force(parser)


def _add_factory(parser: argparse.ArgumentParser, more: str, required: bool) -> None:
    parser.add_argument(
        "--factory",
        required=required,
        metavar="MODULE:FUNCTION",
        help="your function that builds the network, without arguments; it is imported from the "
        f"current folder or from installed packages, which runs your code{more}",
    )


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace a file that is there already")
