"""Two real processes prune as one; a worker that dies is told, and the run goes on."""

import dataclasses
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fasp_graph import Config, prune
from fasp_graph.decide import decide
from fasp_graph.prune import read
from fasp_graph.scale import distributed
from passes.errors import CalibrationError

WORKER = """
import os, sys, datetime
import torch
torch.set_num_threads(1)
from fasp_graph import Config, prune
from fasp_graph.scale.distributed import joined, world
from tests.test_distributed import CASES, batches, decided, model
out, fails = sys.argv[1:]
def progress(stage, done, total):
    if fails == "dies" and world()[0] == 1 and stage == "prune" and done == 4:
        os._exit(7)
try:
    with joined(datetime.timedelta(seconds=60)):
        rank = world()[0]
        pruned = prune(model(), batches()[0], batches(), Config(), progress, work=f"{out}/work")
        found = dict(pruned.plan.kept), pruned.model.state_dict()
        torch.save((found, {name: decided(name) for name in CASES}), f"{out}/{rank}.pt")
except Exception as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(2)
"""


def model():
    torch.manual_seed(0)
    layers = nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)
    return nn.Sequential(*layers).eval()


def batches(*rows, width=12):
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(width, width, generator=generator)
    drawn = [torch.randn(n, width, generator=generator) for n in rows or [60] * 5]
    return [x + x @ mixing / (2 * width**0.5) for x in drawn]


class Stream(nn.Module):
    """A residual stream with an MLP, two linear layers with nothing between, and an MLP whose
    hidden units pass a norm. `entered`: the stream itself has units that can go.
    """

    def __init__(self, entered=False):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(12, 12) if entered else nn.Identity()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 12)
        self.wide, self.narrow = nn.Linear(12, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 6)

    def forward(self, x):
        x = self.enter(x)
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.second(self.first(x))
        h = nn.functional.gelu(self.wide(x))
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-3)
        return self.head(x + self.narrow(h))


class Coupled(Stream):
    """A stream of which every row sees the others, so that no batch can be cut."""

    def forward(self, x):
        return super().forward(x + x.mean(0))


class Routed(nn.Module):
    """Experts picked by an index, one matrix for each, their hidden units far from zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.head = nn.Linear(12, 3), nn.Linear(12, 4)
        self.up = nn.Parameter(torch.randn(3, 10, 12))
        self.shift = nn.Parameter(6 * torch.rand(3, 10, 1))
        self.down = nn.Parameter(torch.randn(3, 12, 10))

    def forward(self, x):
        ids = self.router(x).argmax(-1)
        h = torch.relu(torch.bmm(self.up[ids], x[:, :, None]) + self.shift[ids])
        return self.head(x + torch.bmm(self.down[ids], h).squeeze(-1))


def operator_of(name):
    """An op of a user's own, without a derivative."""

    @torch.library.custom_op(f"distributed::{name}", mutates_args=())
    def swish(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)

    swish.register_fake(torch.empty_like)
    return swish


swish, stubborn = operator_of("swish"), operator_of("stubborn")


def refuse(ctx, inputs, output):
    raise RuntimeError("not where a gradient is asked for")


stubborn.register_autograd(lambda ctx, gradient: gradient, setup_context=refuse)


class Behind(nn.Module):
    """A chain before an op that has no derivative, and one after it; rows are not alone."""

    def __init__(self, stubbornly=False):
        super().__init__()
        torch.manual_seed(0)
        self.stubbornly = stubbornly
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 8)
        self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        between = stubborn if self.stubbornly else swish
        h = between(4 * self.b(torch.relu(self.a(x))))
        return self.d(torch.relu(self.c(4 * h + h.mean(0))))


Entered = functools.partial(Stream, True)
UNEVEN, MANY, FEW = (66, 50, 31), (400, 300, 200), (5, 3, 6, 2, 7, 9, 5, 1, 30, 6, 3)
CASES = {
    "fasp": (Stream, UNEVEN, {"method": "fasp"}),
    "best": (Stream, UNEVEN, {}),
    "best, the dense path beside": (Entered, MANY, {}),
    "best, in little memory": (Stream, MANY, {"max_memory": 40_000}),
    "asymmetric": (Entered, UNEVEN, {"restore": "asymmetric"}),
    "residual": (Entered, UNEVEN, {"restore": "residual"}),
    "curves": (Stream, UNEVEN, {"score": "obs", "restore": "affine", "allocation": "curves"}),
    "standardised": (Stream, UNEVEN, {"method": "flap"}),
    "influence": (Stream, UNEVEN, {"method": "modegpt"}),
    "taylor": (Stream, UNEVEN, {"score": "taylor"}),
    "ridge": (Stream, FEW, {"ridge": "held-out", "restore": "residual"}),
    "experts": (Routed, UNEVEN, {}),
    "ridge of experts": (Routed, FEW, {"ridge": "held-out"}),
    "variance in experts": (Routed, UNEVEN, {"method": "flap"}),
    "one sensed": (Coupled, UNEVEN[:2], {}),
    "one sensed, influence": (Coupled, UNEVEN[:2], {"method": "modegpt"}),
    "one sensed, no gradient": (Behind, UNEVEN[:2], {}),
    "one sensed, no run": (functools.partial(Behind, True), UNEVEN[:2], {}),
    "one fitted, no gradient": (Behind, UNEVEN * 3, {"restore": "outputs", "allocation": "curves"}),
}


@functools.cache
def program_of(make):
    """Captured once for all cases, at four rows."""
    return read(make().double().eval(), batches(4)[0].double())


def decided(name):
    """What is decided for a case, table by table."""
    make, rows, options = CASES[name]
    given = [batch.double() for batch in batches(*rows)]
    program = program_of(make)
    config = Config(sparsity=0.4, **options)
    groups = [group for group in program.deps.groups if group.kind in config.kinds]
    found = decide(program.captured, program.deps, groups, given, config)
    tables = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    tables["rotated"] = sorted(found.rotated)
    return {name: held for name, held in tables.items() if name not in ("budget", "cost")}


def test_fewer_batches_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: (0, 4))

    with pytest.raises(CalibrationError, match="3 calibration batches .* 4 processes .* help"):
        prune(model(), batches()[0], batches()[:3], Config(method="fasp"))


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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Of two processes, that go on after one died, the model that they pruned and the cases."""
    folder = tmp_path_factory.mktemp("ranks")
    (code, text), (dead, _) = two(folder, fails="dies")
    assert dead == 7 and code == 2
    assert "lost another process" in text and "nothing was written" in text
    done = folder / "work" / "00000.safetensors"
    assert sorted(p.name for p in (folder / "work").iterdir()) == [done.name, "key.json"]
    written = done.stat().st_mtime_ns
    ends = two(folder)
    assert [code for code, _ in ends] == [0, 0], ends
    assert done.stat().st_mtime_ns == written  # the first group was taken over
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_go_on_after_one_died_and_choose_and_repair_as_one(ranks):
    alone = prune(model(), batches()[0], batches(), Config())

    ((kept, weights), _), ((_, others), _) = ranks
    assert kept == dict(alone.plan.kept)
    for name, tensor in alone.model.state_dict().items():
        assert torch.allclose(weights[name], tensor, rtol=0, atol=1e-5)
        assert torch.equal(weights[name], others[name])


@pytest.mark.parametrize("name", CASES)
def test_two_processes_decide_as_one(ranks, name):
    alone = decided(name)

    (_, ours), (_, others) = ranks
    near = {"rel": 1e-4, "abs": 1e-6, "nan_ok": True}
    for table, expected in alone.items():
        found, same = ours[name][table], others[name][table]
        if table == "weights":  # a Gram matrix that is rounded otherwise, by 1e-7, changes 1e-5
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
            torch.testing.assert_close(found, same, rtol=0, atol=0)
            continue
        assert repr(found) == repr(same) or table == "notes"
        if table in ("errors", "scores", "curves"):
            expected = {key: pytest.approx(held, **near) for key, held in expected.items()}
        assert found == (pytest.approx(expected, **near) if table == "distances" else expected)
