"""Peak memory of a streamed prune, under a limit that the system enforces.

    limit = data segment after imports and a first small prune + allowance       (RLIMIT_DATA)

RLIMIT_DATA bounds all private writable memory, reserved or touched: an allocation beyond it fails.
The checkpoint is random, OPT-shaped, written shard by shard; the process never holds it.

    python -m benchmarks.memory --hidden 1024 --ffn 4096 --layers 80 --allowance 1000
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from fasp_graph import Config
from fasp_graph.folders.shards import INDEX, write_shard
from fasp_graph.scale.skeleton import from_config
from fasp_graph.scale.streaming import prune_folder
from passes.lazy import Lazy

VOCABULARY = 2048
SHARD = 500_000_000


def shape(hidden: int, ffn: int, layers: int) -> OPTConfig:
    """An OPT configuration with a small vocabulary."""
    return OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=ffn,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
    )


def random_checkpoint(folder: Path, config: OPTConfig) -> int:
    """Write random weights in shards, one tensor in memory at a time; the bytes written."""
    folder.mkdir(parents=True)
    config.architectures = [OPTForCausalLM.__name__]
    config.save_pretrained(folder)
    model = from_config(config, OPTForCausalLM)
    places: dict[str, str] = {}
    shard: dict[str, Lazy] = {}
    held = [*model.named_parameters()]
    written = size = number = 0
    for position, (name, parameter) in enumerate(held):
        shard[name] = Lazy(parameter.shape, torch.float32, _drawn(parameter.shape, position))
        size += parameter.numel() * 4
        if size >= SHARD or position == len(held) - 1:
            path = folder / f"model-{number:05d}.safetensors"
            write_shard(path, shard, {"format": "pt"})
            places |= dict.fromkeys(shard, path.name)
            shard, written, size, number = {}, written + size, 0, number + 1
    index = {"metadata": {"total_size": written}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))
    return written


def _drawn(size: torch.Size, seed: int) -> Any:
    """Normal numbers of deviation 0.02; a vector of a norm is as good as any other."""
    return lambda: torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.02


def tokens(batches: int, rows: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Random calibration batches."""
    generator = torch.Generator().manual_seed(0)
    size = (rows, length)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, size, generator=generator)}
        for _ in range(batches)
    ]


def warm_up() -> None:
    """Products and a solve, so that the libraries have their own buffers."""
    for dtype in (torch.float32, torch.float64):
        matrix = torch.randn(512, 512, dtype=dtype)
        torch.cholesky_solve(
            matrix, torch.linalg.cholesky(matrix @ matrix.T + torch.eye(512) * 512)
        )


def data_segment() -> int:
    """Bytes of private writable memory that the process has reserved."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmData")).split()[1])


def limited(allowance: int) -> int:
    """Let the data segment grow by `allowance` bytes and no more; the limit."""
    limit = data_segment() + allowance
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return limit


def streamed(folder: Path, output: Path, batches: list[Any], max_memory: int | None) -> Any:
    """One streamed prune."""
    config = Config(sparsity=0.3, method="fasp", max_memory=max_memory)
    return prune_folder(folder, tokens(1, 3, 11)[0], batches, config, output)


def measure(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Warm up, set the limit, prune; the figures."""
    torch.set_num_threads(1)
    random_checkpoint(root / "small", shape(64, 128, 1))
    streamed(root / "small", root / "small-out", tokens(2, 4, 64), None)
    warm_up()
    size = random_checkpoint(root / "dense", shape(options.hidden, options.ffn, options.layers))
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    allowance = options.allowance * 1_000_000
    if allowance:
        limited(allowance)
    started = time.perf_counter()
    batches = tokens(options.batches, 4, 128)
    result = streamed(root / "dense", root / "out", batches, allowance // 4 or None)
    return {
        "shape": {k: getattr(options, k) for k in ("hidden", "ffn", "layers")},
        "checkpoint_bytes": size,
        "allowance_bytes": allowance or None,
        "resident_peak_growth_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        - peak_before,
        "tokens": options.batches * 4 * 128,
        "seconds": time.perf_counter() - started,
        "stages": result.report.seconds,
        "verify_max_error": result.report.verify_max_error,
        "params": [result.report.params_before, result.report.params_after],
    }


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("hidden", 1024), ("ffn", 4096), ("layers", 8), ("batches", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--allowance", type=int, default=1000, help="MB; 0: no limit")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
