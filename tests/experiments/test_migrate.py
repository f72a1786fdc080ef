"""Runs are carried over to their present identities, and nothing else about them changes."""

import json
from pathlib import Path

import pytest

from experiments.migrate import carry_record, carry_table, former_key
from experiments.runs.units import run_key
from experiments.status import planned

CONVEX = "networks=lenets suite=convex model=lenet_300_100 seed=0 method=ddlr method.order=cascade"
# Runs to the identities that their rows had, as committed then.
FORMER = {
    f"{CONVEX} method.refit=layer method.relative_tolerance=0.12": "abaf9066e1ae1a3e",
    "networks=lenets suite=goals_convex model=lenet_300_100 seed=0 method.refit=network "
    "goal.kept_fraction=0.05": "3285c282f95d9df5",
    "model=fc_nettrim method=nettrim_protocol calibration_samples=20000 "
    "method.relative_tolerance=0.2": "36529075ec0e21e6",
    "networks=cifar10 suite=goals model=vgg_small method=fewest_weights method.refit=layer "
    "goal.kept_fraction=0.02": "28c93314934de97c",
    "method=lowest_rank model=lenet5 seed=1 method.relative_tolerance=0.2": "c3090fbd70110780",
    "networks=lenets suite=ablation model=lenet_300_100 seed=0 method=activation_svd_selected "
    "method.refit=none goal.kept_fraction=0.05": "f8c67c773fec786b",
    "method=magnitude_global method.relative_tolerance=0.05": "e4608e2732d8ec49",
    "networks=mnist suite=accuracy model=fc_nettrim seed=2 "
    "method.refit=network": "df77e699392620cb",
}
# Written as pandas writes them: what is no key must come out as it went in.
TABLE = """run,method,refit,constraint,accuracy,note
old1,ddlr,fixed,net_trim,97.10,"a, b"
other,ddlr,none,hinge,1e-05,
old2,svd,layer,nettrim,,"said ""so"", then"
old1,ddlr,fixed,net_trim,0.30000000000000004,
"""
KEYS = {"old1": "new1", "old2": "new2", "old3": "new3"}


@pytest.mark.parametrize("run", FORMER)
def test_the_former_identity_of_a_run_is_known(run):
    (cfg,) = planned(run.split())
    assert former_key(cfg) == FORMER[run] != run_key(cfg)


def test_a_table_keeps_its_rows_and_their_order(tmp_path):
    path = tmp_path / "sweeps.csv"
    path.write_text(TABLE)
    assert carry_table(path, KEYS) == (2, 0, 1)
    present = TABLE.replace("old", "new").replace("fixed", "layer").replace("net_trim", "nettrim")
    assert path.read_text() == present
    assert carry_table(path, KEYS) == (0, 2, 1)
    assert path.read_text() == present


def test_a_run_that_was_done_again_is_not_doubled(tmp_path):
    path = tmp_path / "sweeps.csv"
    path.write_text(TABLE + "new1,ddlr,layer,nettrim,98,\n")
    assert carry_table(path, KEYS) == (1, 1, 1)
    lines = path.read_text().splitlines()
    assert [line.partition(",")[0] for line in lines[1:]] == ["other", "new2", "new1"]


def record(run: str, refit: str, **more) -> str:
    row = {"run": run, "refit": refit, "constraint": "hinge"}
    return json.dumps({"row": row, "layers": [row, row], "state": "finished", **more})


def test_a_record_gets_the_name_of_its_run(tmp_path):
    (tmp_path / "old1.json").write_text(record("old1", "fixed", name="a run"))
    assert carry_record(tmp_path, "old1", "new1")
    assert not carry_record(tmp_path, "old1", "new1")
    assert files(tmp_path) == {"new1.json": json.loads(record("new1", "layer", name="a run"))}


def test_a_record_of_a_run_that_failed_has_no_rows(tmp_path):
    failed = {"state": "failed", "error": "an error"}
    (tmp_path / "old1.json").write_text(json.dumps(failed))
    assert carry_record(tmp_path, "old1", "new1")
    assert files(tmp_path) == {"new1.json": failed}


def test_the_record_of_a_run_that_was_done_again_stays(tmp_path):
    again = json.loads(record("new1", "layer", name="again"))
    (tmp_path / "old1.json").write_text(record("old1", "fixed"))
    (tmp_path / "new1.json").write_text(json.dumps(again))
    assert carry_record(tmp_path, "old1", "new1")
    assert files(tmp_path) == {"new1.json": again}


def files(folder: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
