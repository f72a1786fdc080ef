"""The repository as a reader finds it: pages that lead somewhere, commands that exist."""

import ast
import importlib.util
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import ddlr
import nettrim
from experiments.configuration import REPOSITORY

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "results/README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
README_WORDS = 900
# A file has one subject: lines it has at most, by the folder it lies in.
LINES = {"ddlr": 400, "nettrim": 400, "experiments": 450}


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def words_outside_code(text: str) -> int:
    return len(re.sub(r"```.*?```", "", text, flags=re.DOTALL).split())


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as forges and the site make them."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles)
    return {re.sub(r"\s+", "-", title) for title in plain}


def dead_links(page: Path) -> set[str]:
    """The links of a page that lead to no file, or to no heading in one."""
    dead = set()
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            dead.add(link)
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            dead.add(link)
    return dead


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def code_of(page: Path) -> str:
    """All that is set as code in a page, in lines and in blocks."""
    text = page.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```.*?```|`[^`]+`", text, flags=re.DOTALL))


def too_long(root: Path) -> set[str]:
    return {
        f"{path.relative_to(root)}: {lines}"
        for folder, most in LINES.items()
        for path in (root / folder).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > most
    }


def test_the_readme_is_short():
    assert words_outside_code(PAGES[0].read_text(encoding="utf-8")) <= README_WORDS
    assert words_outside_code("one two\n```python\nthree\n```\nfour") == 3


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert dead_links(page) == set()


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](page.md#a-title) [b](#b) [c](c.md) [d](https://example.org)")
    assert dead_links(page) == {"#b", "c.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    code = code_of(page)
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", code)) <= targets
    for module in set(re.findall(r"python -m (experiments\.\w+)", code)):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_names_what_there_is(page):
    modules = {"ddlr": ddlr, "nettrim": nettrim}
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in modules:
                    assert hasattr(modules[node.value.id], node.attr), node.attr


@pytest.mark.parametrize("page", [PAGES[0], REPOSITORY / "docs/your-network.md"], ids=name_of)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # they write files
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 12, generator=generator)
    layers = {"fc1": nn.Linear(12, 30), "relu": nn.ReLU(), "fc2": nn.Linear(30, 4)}
    model = nn.Sequential(OrderedDict(layers))
    held_out = torch.randn(100, 12, generator=generator)
    names = {
        "model": model,
        "calibration": inputs,
        "loader": [(inputs, torch.zeros(200))],
        "inputs": held_out,
        "labels": model(held_out).argmax(dim=1),
    }
    for block in blocks(page, "python"):
        exec(compile(block, name_of(page), "exec"), names)
    assert names["small"] is not model
    assert names["result"].goal.name == "max_accuracy_drop"


def test_files_are_short(tmp_path):
    assert too_long(REPOSITORY) == set()
    (tmp_path / "ddlr").mkdir()
    (tmp_path / "ddlr/long.py").write_text("\n" * 401)
    assert too_long(tmp_path) == {"ddlr/long.py: 401"}
