"""Entries of the cache: up to a size, the longest unused first to go, never half an entry."""

import logging
import os
import subprocess
import sys

import torch

import ddlr
from experiments.networks import mlp_digits
from experiments.runs.preparation import load_captured, store_captured
from experiments.runs.storage import (
    GIB,
    entries,
    load_json,
    load_tensors,
    store_json,
    store_tensors,
)

CPU = torch.device("cpu")


def test_the_cache_keeps_to_its_limit_and_lets_the_longest_unused_go(tmp_path):
    captured = ddlr.capture_layers(mlp_digits(), torch.rand(50, 64))
    paths = [tmp_path / f"{name}.safetensors" for name in "abcd"]
    store_captured(paths[0], captured, limit_gib=1)
    size = paths[0].stat().st_size
    limit = 2.5 * size / 2**30
    for age, path in enumerate(paths[1:3]):
        os.utime(paths[0], (1e9, 1e9))
        store_captured(path, captured, limit_gib=limit)
        os.utime(path, (2e9 + age, 2e9 + age))
    assert [path.exists() for path in paths] == [False, True, True, False]
    # Used: now the latest.
    load_captured(paths[1], mlp_digits(), captured.batches[0].values, torch.device("cpu"))
    os.utime(paths[1], (3e9, 3e9))
    store_captured(paths[3], captured, limit_gib=limit)
    assert [path.exists() for path in paths] == [False, True, False, True]
    left = tmp_path / ".e.safetensors-0.partial"  # by a process that was killed
    left.write_bytes(bytes(size))
    os.utime(left, (0, 0))
    store_captured(paths[3], captured, limit_gib=limit)
    assert not left.exists()
    store_captured(paths[0], captured, limit_gib=size / 2**31)
    assert not paths[0].exists()


def test_what_is_json_keeps_to_the_limit_too_and_counts_as_used_when_it_is_read(tmp_path):
    one, two, three = (tmp_path / f"{name}.json" for name in ("one", "two", "three"))
    content = {"numbers": list(range(1000))}
    store_json(one, content, limit_gib=1)
    limit = 2.5 * one.stat().st_size / GIB
    store_json(two, content, limit_gib=limit)
    os.utime(one, (1e9, 1e9))
    os.utime(two, (2e9, 2e9))
    assert load_json(one) == content  # now the latest: one was the longest unused before
    os.utime(two, (1.5e9, 1.5e9))
    store_json(three, content, limit_gib=limit)
    assert [path.exists() for path in (one, two, three)] == [True, False, True]


def test_an_entry_over_the_limit_is_not_kept_and_makes_no_room(tmp_path, caplog):
    store_json(tmp_path / "kept.json", {"a": 1}, limit_gib=1)
    with caplog.at_level(logging.WARNING):
        store_json(tmp_path / "large.json", {"a": "a" * 1000}, limit_gib=100 / GIB)
        store_tensors(tmp_path / "large.safetensors", {"a": torch.ones(99)}, {}, 100 / GIB)
    assert caplog.text.count("over cache.limit_gib") == 2
    assert [path.name for path, _ in entries(tmp_path)] == ["kept.json"]


def test_half_an_entry_is_none(tmp_path, caplog):
    tensors, about = tmp_path / "a.safetensors", tmp_path / "a.json"
    store_tensors(tensors, {"a": torch.ones(99)}, {"said": "so"}, limit_gib=1)
    store_json(about, {"a": list(range(99))}, limit_gib=1)
    assert load_tensors(tensors, CPU)[1] == {"said": "so"}
    for path in (tensors, about):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert load_tensors(tensors, CPU) is None
    assert load_json(about) is None
    assert caplog.text.count("cannot be read and is computed anew") == 2
    assert load_json(tmp_path / "absent.json") is None
    assert caplog.text.count("\n") == 2


def test_the_command_shows_and_clears_the_cache(tmp_path):
    folder = tmp_path / "outputs/cache"
    captured = ddlr.capture_layers(mlp_digits(), torch.rand(50, 64))
    store_captured(folder / "a.safetensors", captured, limit_gib=1)
    for arguments, said, left in (((), "1 entries", 1), (("clear=true",), "removed 1 entries", 0)):
        done = subprocess.run(
            [sys.executable, "-m", "experiments.cache", *arguments, f"output_dir={folder.parent}"],
            capture_output=True,
            text=True,
        )
        assert said in done.stdout, done.stderr
        assert len(entries(folder)) == left
