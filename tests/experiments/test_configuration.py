"""No config is idle: every file is composed, every key read, every target there."""

import ast
import inspect
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import OmegaConf

import ddlr
from experiments.configuration import CONFIG_PATH, REPOSITORY
from experiments.methods.configured import OF_THE_WALK
from experiments.training import train

CONF = Path(CONFIG_PATH)
# Groups of the sweeps of the paper: each choice is to be in a sweep that some command runs.
SWEPT = ("suite", "networks")
# Left out where a node becomes an object.
NOT_ARGUMENTS = ("_target_", "name", "training")
# Nodes whose entries are handed to a function by their names.
HANDED_TO = {"training": train, "goal": ddlr.Goal}
# Read as `settings[solver]`, `cfg["clear"]`.
BY_NAME = ("SCS", "CLARABEL", "MOSEK", "clear")
# It lists what settings can be, and uses none of them.
NO_READER = REPOSITORY / "experiments/runs/checks.py"

# What is there


def experiments(conf: Path) -> list[list[str]]:
    """The arguments of each sweep of the paper and of the Makefile, but for its variables."""
    makefile = (REPOSITORY / "Makefile").read_text().replace("\\\n", " ")
    lines = [line for line in makefile.splitlines() if " suite=" in line]
    made = [[word for word in line.split() if re.match(r"[a-z_.]+=", word)] for line in lines]
    paper = OmegaConf.load(conf / "paper.yaml").experiments
    return [shlex.split(line) for line in paper] + made


def single(overrides: list[str]) -> list[str]:
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [each.input_line for each in parsed if not each.is_sweep_override()]


def commands() -> dict[str, list[Path]]:
    """The primary configs that commands name, each with the modules of these commands."""
    found: dict[str, list[Path]] = {}
    for path in sorted((REPOSITORY / "experiments").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "config_name":
                found.setdefault(ast.literal_eval(node.value), []).append(path)
    return found


def imported(path: Path, known: set[Path]) -> set[Path]:
    """A module and all of `experiments` that it imports, wherever in it."""
    if path in known:
        return known
    known.add(path)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            other = REPOSITORY / (name.replace(".", "/") + ".py")
            if name.startswith("experiments.") and other.is_file():
                imported(other, known)
    return known


def attributes(modules: list[Path]) -> set[str]:
    """The names of all attributes in these modules and what they import: `seed` for `cfg.seed`."""
    paths = set().union(*(imported(module, set()) for module in modules)) - {NO_READER}
    nodes = chain(*(ast.walk(ast.parse(path.read_text())) for path in paths))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def interpolated(node) -> Iterator[tuple[str, ...]]:
    """The keys that interpolations read, each as its parts; "*" is one that is interpolated."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        for each in node:
            yield from interpolated(each)
    elif isinstance(node, str):
        while innermost := re.search(r"\$\{([^${}]*)\}", node):
            if ":" not in innermost[1]:
                yield tuple(innermost[1].split("."))
            node = node[: innermost.start()] + "*" + node[innermost.end() :]


def selected(modules: list[Path]) -> set[tuple[str, ...]]:
    """The keys that `OmegaConf.select` reads by names put together, like `interpolated`."""
    paths = set().union(*(imported(module, set()) for module in modules))
    found = set()
    for node in chain(*(ast.walk(ast.parse(path.read_text())) for path in paths)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "select" and isinstance(node.args[-1], ast.JoinedStr):
                parts = node.args[-1].values
                texts = [part.value if isinstance(part, ast.Constant) else "*" for part in parts]
                found.add(tuple("".join(texts).split(".")))
    return found


def is_read(key: tuple[str, ...], patterns: set[tuple[str, ...]]) -> bool:
    return any(
        all(part in ("*", own) for part, own in zip(pattern, key, strict=False))
        for pattern in patterns
    )


# What is wrong


def unread(tree: dict, known: set[str], by_select: Iterable[tuple] = ()) -> set[str]:
    """The keys of a composed config that neither code nor an interpolation reads."""
    patterns = {*interpolated(tree), *by_select}
    own = {key: value for key, value in tree.items() if key not in ("hydra", "defaults")}
    return set(_unread(own, (), known, patterns))


def _unread(node: dict, above: tuple[str, ...], known: set[str], patterns) -> Iterator[str]:
    arguments = _arguments(get_object(node["_target_"])) if "_target_" in node else None
    for name, value in node.items():
        key = (*above, name)
        if arguments is not None:
            if name not in arguments and name not in NOT_ARGUMENTS:
                yield ".".join(key)
        elif not (name in known or _is_object(value) or is_read(key, patterns)):
            yield ".".join(key)
            continue
        if isinstance(value, dict):
            handed = _arguments(HANDED_TO[name]) if name in HANDED_TO else set()
            yield from _unread(value, key, known | handed, patterns)


def _is_object(value) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _arguments(function) -> set[str]:
    method = getattr(function, "__self__", None)
    if isinstance(method, ddlr.Method):  # its options; `with_options` refuses any other
        return {*method.options, *method.refit_options, *OF_THE_WALK}
    return set(inspect.signature(function).parameters)


def unread_keys(conf: Path, name: str, variants: list[list[str]]) -> set[str]:
    """The keys that the commands with a primary config read in no variant that has them.

    Those of `paths.yaml`, which every command includes, are read if one of them does.
    """
    modules = commands()
    paths = set(OmegaConf.load(conf / "paths.yaml"))
    known = attributes(modules[name]) | (paths & attributes([*chain(*modules.values())]))
    known |= set(BY_NAME)
    with initialize_config_dir(str(conf), version_base="1.3"):
        trees = [compose(name, overrides, return_hydra_config=True) for overrides in variants]
    if name == "compress":  # of launchers, which may not be installed, the file alone
        trees += [OmegaConf.load(path) for path in conf.glob("launcher/*.yaml")]
    by_select = selected(modules[name])
    return set().union(*(unread(OmegaConf.to_container(tree), known, by_select) for tree in trees))


def variants_of(conf: Path, name: str) -> list[list[str]]:
    """Overrides with which every choice of a group comes up, and every sweep."""
    if name != "compress":
        return [[]]
    groups = ("dataset", "model", "method", "tracking")
    paths = [path for group in groups for path in sorted(conf.glob(f"{group}/*.yaml"))]
    choices = [[f"{path.parent.name}={path.stem}"] for path in paths]
    return choices + [single(overrides) for overrides in experiments(conf)]


def orphans(conf: Path) -> set[str]:
    """The files that no command composes, and the sweeps that no command runs."""
    reached, left = set(), [conf / f"{name}.yaml" for name in commands()]
    while left:
        path = left.pop()
        if path in reached:
            continue
        reached.add(path)
        for default in OmegaConf.load(path).get("defaults", []):
            if isinstance(default, str):
                left += [path.parent / f"{default}.yaml"] if default != "_self_" else []
            else:
                ((group, _),) = default.items()
                group = group.removeprefix("override ").partition("@")[0].strip("/")
                left += conf.glob(f"{group}/*.yaml")
    swept = {argument for overrides in experiments(conf) for argument in overrides}
    for path in conf.rglob("*.yaml"):
        if path.parent.name in SWEPT and f"{path.parent.name}={path.stem}" not in swept:
            reached.discard(path)
    return {str(path.relative_to(conf)) for path in set(conf.rglob("*.yaml")) - reached}


def dead_targets(conf: Path) -> set[str]:
    found = set()
    for path in conf.rglob("*.yaml"):
        for target in re.findall(r"^\s*_target_:\s*(\S+)", path.read_text(), re.MULTILINE):
            try:
                get_object(target)
            except Exception:
                found.add(target)
    return found


def test_every_file_is_composed_and_every_target_exists():
    assert dead_targets(CONF) == set()
    assert orphans(CONF) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(commands()))
def test_every_key_is_read(name):
    assert unread_keys(CONF, name, variants_of(CONF, name)) == set()


@pytest.mark.parametrize("suite", sorted(path.stem for path in (CONF / "suite").glob("*.yaml")))
def test_what_a_suite_tries_on_networks_is_for_those_that_there_are(suite):
    networks = {path.stem for path in (CONF / "networks").glob("*.yaml")}
    tree = OmegaConf.to_container(OmegaConf.load(CONF / f"suite/{suite}.yaml"))
    for pattern in set(interpolated(tree)):
        if "*" in pattern:
            assert set(tree[pattern[0]]) <= networks


@pytest.fixture
def conf(tmp_path) -> Path:
    shutil.copytree(CONF, tmp_path / "conf")
    return tmp_path / "conf"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("compress.yaml", "unheard_of: 1", "unheard_of"),
        ("paths.yaml", "unheard_of: 1", "unheard_of"),
        ("suite/goals.yaml", "unheard_of: 1", "unheard_of"),
        ("networks/lenets.yaml", "launcher: {unheard_of: 1}", "launcher.unheard_of"),
        ("launcher/joblib.yaml", "unheard_of: 1", "unheard_of"),
        ("model/lenet5.yaml", "unheard_of: 1", "model.unheard_of"),
        ("model/lenet5.yaml", "  unheard_of: 1", "model.training.unheard_of"),
        ("method/ddlr.yaml", "unheard_of: 1", "method.unheard_of"),
        ("tracking/csv.yaml", "unheard_of: 1", "tracking.unheard_of"),
    ],
)
def test_a_key_that_nothing_reads_is_found(file, line, found, conf):
    text = (conf / file).read_text().rstrip()
    own, hydra, of_hydra = text.partition("\nhydra:\n")
    (conf / file).write_text(f"{own}\n{line}\n{hydra}{of_hydra}\n")
    variants = [
        ["networks=mnist", "suite=goals"],
        ["networks=lenets", "suite=baselines", "model=lenet5", "tracking=csv"],
    ]
    assert unread_keys(conf, "compress", variants) == {found}


def test_a_key_that_other_commands_alone_read_is_found(conf):
    (conf / "collect.yaml").write_text((conf / "collect.yaml").read_text() + "seed: 0\n")
    assert unread_keys(conf, "collect", [[]]) == {"seed"}


@pytest.mark.parametrize(
    "file", ["alone.yaml", "group/alone.yaml", "suite/alone.yaml", "networks/alone.yaml"]
)
def test_a_file_that_nothing_composes_is_found(file, conf):
    (conf / file).parent.mkdir(exist_ok=True)
    (conf / file).write_text("seed: 0\n")
    assert orphans(conf) == {file}


def test_a_target_that_does_not_exist_is_found(conf):
    (conf / "method/svd.yaml").write_text("_target_: experiments.methods.closed_forms.SVDD\n")
    assert dead_targets(conf) == {"experiments.methods.closed_forms.SVDD"}
