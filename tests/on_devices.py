"""Prunes on the devices of tests/side.py, in a process of its own: torch knows them to its end.

python -m tests.on_devices FOLDER    one JSON object: case -> what was seen
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import fasp_graph as fg
from fasp_graph.prune import read
from fasp_graph.scale import spill
from fasp_graph.scale.devices import bounds
from fasp_graph.scale.spill import held_bytes
from fasp_graph.scale.streaming import prune_folder
from passes.capture import as_args
from passes.consumers import linears
from passes.observe import walk
from passes.placement import moved
from passes.room import Room
from tests.side import Side, devices, ran

TWO = ("side:0", "side:1")
CASES = {
    "fasp": {},
    "none": {"restore": "none"},
    "residual": {"restore": "residual"},
    "asymmetric": {"restore": "asymmetric"},
    "greedy": {"score": "obs", "restore": "affine"},
    "rotation": {"score": "rotation", "restore": "obs"},
    "modegpt": {"score": "modegpt", "restore": "obs"},
    "numerical": {"score": "numerical"},
    "flap": {"score": "flap", "restore": "bias"},
    "kinds": {"kinds": ("chain", "bilinear", "head")},
    "width": {"kinds": ("width",)},
    "held out": {"ridge": "held-out", "restore": "affine"},
    "four": {"compute_on": ("side:0", "side:1", "side:2", "side:3")},
    "one": {"compute_on": ("side:1",)},
    "spilled": {"max_memory": 40_000, "restore": "residual"},
}


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=64)).double().eval()


def experts():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    config = MixtralConfig(**sizes, **heads, vocab_size=64)
    return MixtralForCausalLM(config).eval()


def convolutions():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 16, 5)).double().eval()


class Writes(nn.Module):
    """A buffer is written, and read behind a product with a weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x):
        inner = torch.relu(self.enter(x))
        self.mean.copy_(inner.mean(0))
        return self.leave(inner - self.mean)


def rows():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 16, generator=generator, dtype=torch.double) for _ in range(4)]


def ids():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (2, 24), generator=generator)} for _ in range(4)]


def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.double) for _ in range(4)]


def pair(model, data, options, program=None):
    """The same on the CPU and on devices: whether plans agree, how far weights are apart, where
    they ended, and the products on each device.
    """
    options = {"method": "fasp", "sparsity": 0.4, "compute_on": TWO, **options}
    program = program or read(model, data[0])
    config = fg.Config(**{**options, "compute_on": ()})
    plain = fg.prune(model, data[0], data, config, program=program)
    ran.clear()
    placed = fg.prune(model, data[0], data, fg.Config(**options), program=program)
    both = zip(plain.model.parameters(), placed.model.parameters(), strict=True)
    told = dict(ran)
    return {
        "same": plain.plan == placed.plan,
        "apart": max(float((a - b).detach().abs().max()) for a, b in both),
        "on": sorted({str(p.device) for p in placed.model.parameters()}),
        "calls": {
            place: sum(n for (_, where), n in told.items() if where == place)
            for place in {where for _, where in told}
        },
        "to host": told.get(("aten._to_copy.default", "cpu"), 0),
    }


def bounded():
    """Most bytes of values on a device, at stops of a walk over a model that is there, before and
    after what enters each layer is summed, and the budget, of which a batch takes a part.
    """
    module = read(llama(), ids()[0]).captured.graph_module.to("side:0")
    batches = [moved(as_args(batch), torch.device("side:0")) for batch in ids() * 4]
    views = {view.node: view for view in linears(module)}
    budget, found, grams = 100_000, [], []

    def visit(state, node):
        found.append(on_device(state))
        grams.append(state.moments(views[node]).gram.cpu())
        found.append(on_device(state))

    settle, devices = bounds(module, fg.Config(max_memory=budget))
    walk(module, batches, views, visit, room=Room(settle=settle, devices=devices))
    bound, grams = grams, []
    walk(module.to("cpu"), [as_args(batch) for batch in ids() * 4], views, visit)
    apart = max(float((one - other).abs().max()) for one, other in zip(bound, grams, strict=True))
    return {"most": max(found), "budget": budget, "apart": apart, "stops": len(bound)}


def on_device(state):
    """Bytes of the values of all batches that are on a device."""
    values = [v for e in state.environments for v in e.values() if isinstance(v, Side)]
    return held_bytes(values)


def streamed(root: Path):
    """A folder, in memory on the CPU and weight by weight on devices."""
    llama().float().save_pretrained(root / "dense", max_shard_size=20_000)
    model = LlamaForCausalLM.from_pretrained(root / "dense").eval()
    pruned = fg.prune(model, ids()[0], ids(), fg.Config(method="fasp"))
    config = fg.Config(method="fasp", compute_on=TWO)
    ran.clear()
    found = prune_folder(root / "dense", ids()[0], ids(), config, root / "out")
    small = fg.load(root / "out")
    both = zip(pruned.model.parameters(), small.parameters(), strict=True)
    return {
        "same": found.plan == pruned.plan,
        "apart": max(float((a - b).detach().abs().max()) for a, b in both),
        "on": sorted({where for _, where in ran}),
    }


def main() -> None:
    devices()
    spill.SMALLEST = 1
    model = llama()
    program = read(model, ids()[0])
    seen = {name: pair(model, ids(), options, program) for name, options in CASES.items()}
    seen["experts"] = pair(experts(), ids(), {})
    seen["convolutions"] = pair(convolutions(), images(), {"restore": "affine"})
    seen["writes"] = pair(Writes().double().eval(), rows(), {})
    seen["bounded"] = bounded()
    seen["streamed"] = streamed(Path(sys.argv[1]))
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
