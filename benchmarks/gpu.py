"""Absolute times on one GPU: models of OPT-125M's, OPT-1.3B's and LLaMA-7B's shapes at full depth.

Random weights made on the GPU, 128 windows of 2,048 random tokens. `forward` is one plain pass of
the model over them; `prune` is the walk, by method; the other stages do not depend on the tokens.
Latency: dense and compact class and graph, medians of alternating runs. Before that, greedy
elimination alone, on a consumer of LLaMA-7B's MLP. A run on the same GPU adds to the file's rows.

    python -m benchmarks.gpu [--shapes opt-125m opt-1.3b llama-7b] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from benchmarks.two_pass import two_pass
from fasp_graph import Config, Pruned, prune
from fasp_graph.evaluate import flops
from fasp_graph.prune import Program, read
from fasp_graph.timing import latency
from passes.eliminate import Problem, eliminate

SPARSITY = 0.3
VOCABULARY = 32_000


def _opt(layers: int, width: int, heads: int) -> nn.Module:
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    depth = {"num_hidden_layers": layers, "num_attention_heads": heads}
    return OPTForCausalLM(OPTConfig(**sizes, **depth, vocab_size=50_272))


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048))


SHAPES: dict[str, tuple[Callable[[], nn.Module], torch.dtype]] = {
    "opt-125m": (lambda: _opt(12, 768, 12), torch.float32),
    "opt-1.3b": (lambda: _opt(24, 2048, 32), torch.float16),
    "llama-7b": (_llama, torch.bfloat16),
}


def built(name: str) -> nn.Module:
    """A model with random weights, made where it runs."""
    make, dtype = SHAPES[name]
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("cuda"):
            return make().eval()
    finally:
        torch.set_default_dtype(usual)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds of a call, and its result."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return time.perf_counter() - started, result


def windows(count: int, length: int, batch: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (count, length)
    ids = torch.randint(0, VOCABULARY, shape, generator=generator, device="cuda")
    return [{"input_ids": rows} for rows in ids.split(batch)]


@torch.no_grad()
def _forward(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> None:
    for batch in data:  # the head's logits are not needed by any method
        model.model(**batch, use_cache=False)


def eliminated(inputs: int, outputs: int) -> dict[str, Any]:
    """Seconds of the greedy elimination of a consumer's columns, random weights and inputs."""
    torch.manual_seed(0)
    rows = torch.randn(4096, inputs, device="cuda", dtype=torch.float64)
    second = rows.T @ rows / len(rows)
    second.diagonal().add_(1e-2 * second.diagonal().mean())
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.float64)
    problem = Problem(weight, second, torch.arange(inputs, device="cuda"))
    removals = int(SPARSITY * inputs)
    eliminate([problem], [0] * inputs, 1)  # kernels are loaded
    seconds, _ = timed(lambda: eliminate([problem], [0] * inputs, removals))
    return {"inputs": inputs, "outputs": outputs, "removals": removals, "seconds": seconds}


def measure(name: str, data: list[dict[str, torch.Tensor]], methods: list[str]) -> dict[str, Any]:
    """One row: times of a plain pass, of every method, of the two-pass reference, latencies."""
    model = built(name)
    example = {"input_ids": data[0]["input_ids"][:2, :17]}
    _forward(model, data[:1])
    forward, _ = timed(lambda: _forward(model, data))
    program = read(model, example)
    row: dict[str, Any] = {
        "shape": name,
        "dtype": str(SHAPES[name][1]).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "batches": [len(data), *data[0]["input_ids"].shape],
        "forward": forward,
        "methods": {},
    }
    for method in methods:
        whole, pruned = timed(lambda m=method: _pruned(model, example, data, m, program))
        row["methods"][method] = {
            **pruned.report.seconds,
            "whole": whole + sum(program.seconds.values()),
            "passes": pruned.report.seconds["prune"] / forward,
            "verify_max_error": pruned.report.verify_max_error,
            "peak_gpu_bytes": pruned.report.peak_memory_cuda,
        }
        print(name, method, json.dumps(row["methods"][method]), flush=True)
        if method == methods[0]:
            row["latency"] = list(latencies(model, pruned))
        ratio = pruned.plan.ratio
        del pruned
    layered = copy.deepcopy(model)
    stack = layered.model.decoder.layers if hasattr(layered.model, "decoder") else None
    stack = layered.model.layers if stack is None else stack
    row["two_pass"], _ = timed(lambda: two_pass(layered, stack, data, ratio))
    return row


def _pruned(
    model: nn.Module, example: Any, data: list[Any], method: str, program: Program
) -> Pruned:
    config = Config(sparsity=SPARSITY, method=method, align=8)
    return prune(model, example, data, config, program=program)


@torch.no_grad()
def latencies(model: nn.Module, pruned: Pruned) -> Iterator[dict[str, Any]]:
    """Prefill of 1 x 128 up to 16 x 1,024 tokens: speed-up of class and graph, and the ideal."""
    for batch, length in ((1, 128), (1, 1024), (16, 128), (16, 1024)):
        ids = {"input_ids": torch.randint(0, VOCABULARY, (batch, length), device="cuda")}
        calls = {
            "dense class": lambda i=ids: model(**i, use_cache=False),
            "compact class": lambda i=ids: pruned.model(**i, use_cache=False),
            "compact graph": lambda i=ids: pruned.graph_module(**i),
        }
        found = {name: held["median"] for name, held in latency(calls, repeats=9).items()}
        ideal = flops(model, (), ids) / flops(pruned.graph_module, (), ids)
        yield {"batch": batch, "length": length, "ideal": ideal, **found}


def _earlier(path: Path) -> list[dict[str, Any]]:
    """The rows that the same kind of GPU and torch have given."""
    held = json.loads(path.read_text()) if path.exists() else {}
    here = (torch.cuda.get_device_name(), torch.__version__)
    return held["rows"] if (held.get("gpu"), held.get("torch")) == here else []


def main() -> None:
    """Measure and write JSON after every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=["fasp", "best"])
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    options = parser.parse_args()
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "sparsity": SPARSITY,
        "eliminate": eliminated(11_008, 4_096),
        "rows": _earlier(options.output),
    }
    for name in options.shapes:
        data = windows(options.windows, options.length, options.batch)
        found["rows"].append(measure(name, data, options.methods))
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        torch.cuda.empty_cache()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
