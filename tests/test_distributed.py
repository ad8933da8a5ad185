"""Two real processes prune as one; a worker that dies is told, and the run goes on."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from fasp_graph import Config, prune

WORKER = """
import json, os, sys, datetime
import torch
torch.set_num_threads(1)
from fasp_graph import Config
from fasp_graph import prune
from fasp_graph.scale.distributed import joined, world
from passes.errors import ConfigError
from tests.test_distributed import batches, model
out, fails = sys.argv[1:]
def progress(stage, done, total):
    if fails == "dies" and world()[0] == 1 and stage == "prune" and done == 4:
        os._exit(7)
try:
    with joined(datetime.timedelta(seconds=60)):
        try:
            prune(model(), batches()[0], batches(), Config(method="best"))
        except ConfigError as error:
            print(error, file=sys.stderr)
        config = Config(sparsity=0.4, method="fasp")
        pruned = prune(model(), batches()[0], batches(), config, progress, work=f"{out}/work")
        rank = world()[0]
    torch.save((dict(pruned.plan.kept), pruned.model.state_dict()), f"{out}/{rank}.pt")
except Exception as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(2)
"""


def model():
    torch.manual_seed(0)
    layers = nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)
    return nn.Sequential(*layers).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(60, 12, generator=generator) for _ in range(5)]


def two(folder: Path, fails: str = "no") -> list[tuple[int, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), fails],
            env={**os.environ, **common, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [process.communicate(timeout=120)[1] for process in started]
    return [(process.returncode, end) for process, end in zip(started, ends, strict=True)]


def test_two_processes_go_on_after_one_died_and_choose_and_repair_as_one(tmp_path):
    (code, text), (dead, _) = two(tmp_path, fails="dies")
    assert dead == 7 and code == 2
    assert "lost another process" in text and "nothing was written" in text
    done = tmp_path / "work" / "00000.safetensors"
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == [done.name, "key.json"]
    written = done.stat().st_mtime_ns
    ends = two(tmp_path)
    assert [code for code, _ in ends] == [0, 0], ends
    assert all("one process only" in text for _, text in ends)  # of method="best"
    assert done.stat().st_mtime_ns == written  # the first group was taken over
    alone = prune(model(), batches()[0], batches(), Config(sparsity=0.4, method="fasp"))
    (kept, weights), (_, others) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert kept == dict(alone.plan.kept)
    for name, tensor in alone.model.state_dict().items():
        assert torch.allclose(weights[name], tensor, rtol=0, atol=1e-5)
        assert torch.equal(weights[name], others[name])
