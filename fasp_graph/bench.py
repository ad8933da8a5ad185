"""bench: models compared fairly, on the same inputs.

latency   one forward pass, median and interquartile range of runs that alternate between all
          models and runtimes (fasp_graph/timing.py)
speedup   against the first model in the same runtime, and what these runs can tell of it
tokens/s  tokens of the input / median latency
memory    growth of the peak resident memory of a fresh process that loads the model, in torch by
          its name, in ONNX Runtime by its file, and runs it once (on CUDA the allocator's peak)

ONNX Runtime runs on the CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from passes.capture import Args, as_args, capture
from passes.errors import FaspGraphError

from . import memory as peaks
from .data import load_target, refuse_long
from .evaluate import flops, perplexity, size_of
from .exports.onnx import onnx_session, run_session, write_graph
from .targets import Target, refuse_unrunnable
from .timing import rounds, speedup, summary, threads

VARIED = 0.25  # interquartile range / median: torch.utils.benchmark's for a disturbed measurement
UNTOLD = 1.1  # high / low of a speedup around 1


@dataclass(frozen=True)
class Result:
    """One model in one runtime; seconds, bytes; None where it does not apply. `speedup`: how many
    times as fast as the first model, `speedup_range`: where it lies with about 95%.
    """

    model: str
    runtime: str
    parameters: int
    bytes: int
    flops: int
    median: float
    spread: float
    tokens_per_second: float | None
    peak_memory: int | None
    perplexity: float | None
    speedup: float | None = None
    speedup_range: tuple[float, float] | None = None
    warning: str | None = None


def bench(
    targets: list[Target],
    batch: int = 1,
    length: int = 128,
    runs: int = 15,
    onnx: bool = True,
    memory: bool = True,
    count: int | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Compare models that take inputs of the same form; tokens [batch, length] for decoders;
    `count` threads, None: as many as torch has.
    """
    _alike(targets)
    samples = [sample_inputs(target, batch, length) for target in targets]
    calls: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as scratch, threads(count):
        for number, (target, sample) in enumerate(zip(targets, samples, strict=True)):
            step(f"{target.name}: set up")
            calls[f"{number} torch"] = _torch_call(target, sample)
            if onnx:
                step(f"{target.name}: to ONNX")
                path = _onnx_file(Path(scratch), number)
                calls[f"{number} onnxruntime"] = _onnx_call(target, sample, path)
        step("runs, alternating")
        times = rounds(calls, runs)
        held: dict[str, int | None] = dict.fromkeys(calls)
        for key in calls if memory else ():
            number, runtime = int(key.split()[0]), key.split()[1]
            step(f"{targets[number].name}: memory")
            if runtime == "onnxruntime":
                held[key] = session_memory(_onnx_file(Path(scratch), number), samples[number])
            elif targets[number].source:
                held[key] = _memory(targets[number], batch, length)
    found = []
    for key in calls:
        number, runtime = int(key.split()[0]), key.split()[1]
        step(f"{targets[number].name}: perplexity")
        found.append(_result(targets[number], runtime, samples[number], times[key], held[key]))
    first = {runtime: key for key in reversed(calls) for runtime in key.split()[1:]}
    return [
        _compared(row, targets[0].name, times[first[row.runtime]], times[key])
        for row, key in zip(found, calls, strict=True)
    ]


def _result(
    target: Target, runtime: str, sample: Args, seconds: list[float], memory: int | None
) -> Result:
    text = target.heldout if runtime == "torch" else None
    tokens = sum(v.numel() for v in _ids(sample)[:1])
    times = summary(seconds)
    return Result(
        target.name,
        runtime,
        *size_of(target.model),
        flops(target.model, *sample),
        times["median"],
        times["spread"],
        tokens / times["median"] if tokens else None,
        memory,
        perplexity(target.model, text) if text is not None else None,
    )


def _compared(row: Result, dense: str, base: list[float], own: list[float]) -> Result:
    """With the speedup over the first model, and what the runs are too far apart for."""
    told = []
    if row.spread > VARIED * row.median:
        told.append(f"its runs vary by {row.spread / row.median:.0%} of their median")
    if own is not base:
        ratio, low, high = speedup(base, own)
        row = replace(row, speedup=ratio, speedup_range=(low, high))
        if low < 1 < high and high > UNTOLD * low:
            told.append(
                f"it is {low:.2f} to {high:.2f} times as fast as {dense}, which does not say "
                "which of them is faster"
            )
    if not told:
        return row
    ways = "an idle machine, more --runs, or --threads 1"
    return replace(
        row, warning=f"{row.model} in {row.runtime}: {', and '.join(told)} · help: {ways}"
    )


def _memory(target: Target, batch: int, length: int) -> int:
    device = next((held.device for held in target.model.parameters()), torch.device("cpu"))
    return peak_memory(target.source, batch, length, str(device))


def sample_inputs(target: Target, batch: int, length: int) -> Args:
    """The example inputs; where they are token ids, ids [batch, length] within their range."""
    args, kwargs = as_args(target.inputs)
    found = _ids((args, kwargs))
    if not found:
        return args, kwargs
    refuse_long(target, length)
    high = int(found[0].max()) + 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, high, (batch, length), generator=generator).to(found[0].device)

    def resized(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != found[0].shape:
            return value
        return ids if value is found[0] else torch.ones_like(ids, dtype=value.dtype)

    return tuple(map(resized, args)), {name: resized(value) for name, value in kwargs.items()}


def _ids(sample: Args) -> list[Tensor]:
    """Token ids among inputs: integers [batch, length]."""
    values = (*sample[0], *sample[1].values())
    return [v for v in values if isinstance(v, Tensor) and v.dtype == torch.long and v.dim() == 2]


def _alike(targets: list[Target]) -> None:
    forms = {tuple(sorted(as_args(target.inputs)[1])) for target in targets}
    if len(forms) > 1:
        names = ", ".join(target.name for target in targets)
        raise FaspGraphError(
            f"{names} take inputs of other names, so they cannot be compared · help: bench each by "
            "itself"
        )


def _torch_call(target: Target, sample: Args) -> Callable[[], Any]:
    model = target.model.eval()
    refuse_unrunnable(target, *sample)

    def call() -> Any:
        with torch.no_grad():
            return model(*sample[0], **sample[1])

    return call


def _onnx_file(scratch: Path, number: int) -> Path:
    return scratch / f"{number}.onnx"


def _onnx_call(target: Target, sample: Args, path: Path) -> Callable[[], Any]:
    captured = capture(target.model, target.inputs)
    write_graph(captured.graph_module, captured.inputs, captured.dynamic_shapes, path)
    session = onnx_session(path)
    return lambda: run_session(session, sample)


def peak_memory(text: str, batch: int, length: int, device: str = "cpu") -> int:
    """Bytes by which a fresh process grows at most while it loads `text` and runs it once."""
    return _fresh(text, "torch", text, str(batch), str(length), device)


def session_memory(path: Path, sample: Args) -> int:
    """Bytes by which a fresh process grows at most while ONNX Runtime loads a file and runs it
    once on `sample`, which lies beside it meanwhile.
    """
    beside = path.with_suffix(".safetensors")
    leaves = [leaf for leaf in pytree.tree_leaves(sample) if isinstance(leaf, Tensor)]
    save_file({f"{k:03}": leaf.cpu().contiguous().clone() for k, leaf in enumerate(leaves)}, beside)
    return _fresh(path.name, "onnxruntime", str(path), str(beside))


def _fresh(name: str, *arguments: str) -> int:
    command = [sys.executable, "-m", "fasp_graph.bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise FaspGraphError(
            f"measuring the memory of {name} failed: {done.stderr.strip()[-300:]} · help: "
            "--no-memory leaves it out"
        )
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_memory"])


def _grown(call: Callable[[], Any]) -> int:
    peaks.restart()
    before = peaks.peak_host() or 0
    call()
    return peaks.peak_cuda() or max(0, (peaks.peak_host() or 0) - before)


def _torch_once(text: str, batch: str, length: str, device: str) -> int:
    def call() -> None:
        target = load_target(text, device=device)
        sample = sample_inputs(target, int(batch), int(length))
        with torch.no_grad():
            target.model(*sample[0], **sample[1])

    return _grown(call)


def _onnx_once(path: str, beside: str) -> int:
    held = load_file(beside)
    sample = tuple(held[name] for name in sorted(held))
    return _grown(lambda: run_session(onnx_session(path), (sample, {})))


if __name__ == "__main__":
    once: dict[str, Callable[..., int]] = {"torch": _torch_once, "onnxruntime": _onnx_once}
    print(json.dumps({"peak_memory": once[sys.argv[1]](*sys.argv[2:])}))
