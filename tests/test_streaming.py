"""A folder is pruned weight by weight as in memory; a killed run goes on where it was."""

import filecmp
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import fasp_graph as fg
from fasp_graph import cli, refit
from fasp_graph.folders.lazyfolder import open_folder
from fasp_graph.folders.shards import Stored, folder_tensors, write_shard
from fasp_graph.scale.journal import KEY, _begin, close, work_folder
from fasp_graph.scale.streaming import prune_folder
from passes.capture import as_args, capture
from passes.compare import tensors
from passes.errors import ConfigError, FaspGraphError
from passes.lazy import Lazy, materialized
from passes.observe import begun, last_reads

SHARD = 20_000
CONFIG = fg.Config(sparsity=0.4, method="fasp")
INPUTS = {"input_ids": torch.arange(33).view(3, 11) % 50}
KILLED = """
import os, signal, sys
from fasp_graph.scale.journal import work_folder
from fasp_graph.scale.streaming import prune_folder
from tests.test_streaming import CONFIG, INPUTS, SHARD, batches
dense, output = sys.argv[1:]
def progress(stage, done, total):
    if len(list(work_folder(output).glob("*.safetensors"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
prune_folder(dense, INPUTS, batches(), CONFIG, output, None, SHARD, progress)
"""


def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 50, (4, 16), generator=generator)} for _ in range(3)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "vocab_size": 50}
    config = OPTConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    folder = tmp_path_factory.mktemp("dense")
    OPTForCausalLM(config).save_pretrained(folder, max_shard_size=SHARD)
    return folder


@pytest.fixture(scope="module")
def in_memory(dense, tmp_path_factory):
    model = OPTForCausalLM.from_pretrained(dense).eval()
    pruned = fg.prune(model, INPUTS, batches(), CONFIG)
    return fg.save(pruned, tmp_path_factory.mktemp("memory") / "out", max_shard_size=SHARD)


def test_a_promised_weight_is_gone_before_the_next_is_read(dense, monkeypatch):
    alive, most = [], []

    def read(self):
        numbers = taken(self)
        alive.append(weakref.ref(numbers))
        here = {id(held()) for held in alive if held() is not None}
        most.append(len(here))
        return numbers

    taken = Stored.read
    module = capture(open_folder(dense), INPUTS).graph_module
    monkeypatch.setattr(Stored, "read", read)
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    state = begun(module, [as_args(batch) for batch in batches()])
    with torch.no_grad():
        state.run(nodes, last_reads(module))
    assert len(most) > 10 and max(most) == 2  # a weight and its bias


def weights(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_killed_and_resumed_the_folder_is_that_of_memory(dense, in_memory, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(dense), str(output)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = sorted(work_folder(output).glob("*.safetensors"))
    assert len(left) == 1 and not output.exists()
    before = [path.stat().st_mtime_ns for path in left]

    seen = []

    def progress(stage, done, total):
        seen.append([path.stat().st_mtime_ns for path in left if path.exists()])

    prune_folder(dense, INPUTS, batches(), CONFIG, output, None, SHARD, progress)
    assert seen[-1] == before  # taken over, not made again
    assert len(weights(output)) > 2 and weights(output) == weights(in_memory)
    for name in weights(output):
        assert filecmp.cmp(output / name, in_memory / name, shallow=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    loaded, expected = fg.load(output), fg.load(in_memory)
    assert torch.equal(loaded(**INPUTS).logits, expected(**INPUTS).logits)


def test_turned_groups_stream_and_resume(dense, tmp_path):
    config = fg.Config(method="slimgpt", score="rotation", ridge="held-out", sparsity=0.4)
    output, model = tmp_path / "out", OPTForCausalLM.from_pretrained(dense).eval()

    def interrupted(stage, done, total):
        if len(list(work_folder(output).glob("*.safetensors"))) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_folder(dense, INPUTS, batches(), config, output, None, SHARD, interrupted)
    report = prune_folder(dense, INPUTS, batches(), config, output, None, SHARD).report
    pruned = fg.prune(model, INPUTS, batches(), config)

    assert sorted(group.rotated for group in report.groups) == [False, True]
    assert report.notes == pruned.report.notes and report.ridges == pruned.report.ridges != {}
    errors = ([g.error_after for g in held.groups] for held in (report, pruned.report))
    assert next(errors) == next(errors)
    logits = pruned.model.eval()(**INPUTS).logits
    torch.testing.assert_close(fg.load(output)(**INPUTS).logits, logits, rtol=0, atol=1e-6)


def test_what_cannot_be_streamed_is_refused(dense, tmp_path):
    with pytest.raises(ConfigError, match="allocation=sensitivity"):
        prune_folder(dense, INPUTS, batches(), fg.Config(method="best"), tmp_path / "out")
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "config.json").write_bytes((dense / "config.json").read_bytes())
    held = {name: found.lazy() for name, found in folder_tensors(dense).items()}
    shape = held.pop("model.decoder.layers.0.fc2.weight").shape
    write_shard(partial / "model.safetensors", held, {})
    with pytest.raises(FaspGraphError, match=r"layers.0.fc2.weight .* lacks it"):
        open_folder(partial)
    coded = Lazy(shape, torch.int8, lambda: torch.zeros(shape, dtype=torch.int8))
    write_shard(
        partial / "model.safetensors", held | {"model.decoder.layers.0.fc2.weight": coded}, {}
    )
    with pytest.raises(FaspGraphError, match=r"torch.int8, which stands for other numbers"):
        open_folder(partial)
    os.truncate(partial / "model.safetensors", 5000)
    with pytest.raises(FaspGraphError, match="cut short"):
        open_folder(partial)


def test_a_model_with_buffers_is_streamed(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()  # inv_freq is a buffer
    model.save_pretrained(tmp_path)

    captured = capture(open_folder(tmp_path), INPUTS)

    assert captured.compared and captured.dynamic_shapes is not None
    with torch.no_grad():
        (found,) = tensors(captured.graph_module(**INPUTS))
        assert torch.equal(found, model(**INPUTS).logits)


def test_a_folder_opens_as_the_class_that_it_names(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 50}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2)).eval()
    model.save_pretrained(tmp_path)

    opened = open_folder(tmp_path)

    assert type(opened) is type(model)
    assert torch.equal(opened(**INPUTS).logits, model(**INPUTS).logits)


def test_the_command_line_streams_folders_only(monkeypatch, capsys):
    words = ["fasp-graph", "prune", "zoo:opt-random", "--stream", "--no-resume", "--method", "fasp"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "--stream reads a folder" in " ".join(capsys.readouterr().err.split())


def model():
    torch.manual_seed(0)
    layers = nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)
    return nn.Sequential(*layers).eval()


def test_a_run_in_memory_resumes_with_the_same_numbers(tmp_path, monkeypatch):
    data = [torch.randn(18, 12, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    work, repaired = tmp_path / "work", []
    real = refit.restore

    def counted(*args):
        repaired.append(1)
        if len(repaired) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(refit, "restore", counted)
    with pytest.raises(KeyboardInterrupt):
        fg.prune(model(), data[0], data, CONFIG, work=work)
    resumed = fg.prune(model(), data[0], data, CONFIG, work=work)
    assert len(repaired) == 3  # one before, one broken off, one after
    again = fg.prune(model(), data[0], data, CONFIG, work=work)
    assert len(repaired) == 3
    whole_run = fg.prune(model(), data[0], data, CONFIG)
    assert resumed.plan == again.plan == whole_run.plan
    for name, tensor in whole_run.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor)
    assert [g.error_after for g in resumed.report.groups] == [
        g.error_after for g in whole_run.report.groups
    ]
    assert resumed.report.notes == whole_run.report.notes
    assert (
        "36 calibration samples for the 40 channels that enter 2.weight" in resumed.report.notes[0]
    )
    count = len(repaired)
    fg.prune(model(), data[0], data[:1], CONFIG, work=work)  # other data: another run
    assert len(repaired) == count + 2
    close(work)
    assert not work.exists()


def test_a_folder_that_is_no_journal_stays(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(FaspGraphError, match="no journal"):
        fg.prune(model(), torch.randn(3, 12), [torch.randn(60, 12)], CONFIG, work=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_a_lazy_weight_reads_for_numbers_only():
    reads = []

    def read():
        reads.append(1)
        return torch.arange(12.0).view(3, 4)

    promise = Lazy((3, 4), torch.float32, read)
    moved = promise.double().index_select(1, torch.tensor([3, 0])).clone()
    assert moved.shape == (3, 2) and moved.dtype == torch.float64 and not reads
    assert torch.equal(materialized(moved), read().double()[:, [3, 0]])
    assert torch.equal(promise @ torch.ones(4), read().sum(1))
    with pytest.raises(RuntimeError, match="lazy"):
        promise.add_(1)


LIMITED = """
import sys, argparse, json
from pathlib import Path
from benchmarks.memory import measure
sizes = argparse.Namespace(hidden=1024, ffn=1024, layers=3, batches=1, allowance=60)
print(json.dumps(measure(sizes, Path(sys.argv[1]))))
"""


def test_a_folder_larger_than_memory_is_pruned(tmp_path):
    """85 MB of weights, 60 MB of memory that the system grants; docs/scale.md has larger ones."""
    command = [sys.executable, "-W", "ignore", "-c", LIMITED, str(tmp_path)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    assert found["checkpoint_bytes"] > 1.4 * found["allowance_bytes"]
    assert found["verify_max_error"] < 1e-9
    assert folder_tensors(tmp_path / "out").keys() == folder_tensors(tmp_path / "dense").keys()


HOLD = """
import fcntl, sys
held = open(sys.argv[1], "r+")
fcntl.lockf(held, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_share_a_journal(tmp_path):
    folder = tmp_path / "work"
    _begin(folder, "mine").close()
    command = [sys.executable, "-c", HOLD, str(folder / KEY)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"

    with pytest.raises(fg.FaspGraphError, match="another process works in .* · help: wait for it"):
        _begin(folder, "another")

    other.communicate()
    assert KEY in {path.name for path in folder.iterdir()}
    _begin(folder, "another").close()
