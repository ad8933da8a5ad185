"""A plan on paper for models that no machine here holds: time, memory, network bytes per stage.

    forward  2 P T                       walk's overhead: `multiple` of benchmarks/speed.py
    Gram     sum over consumers T d^2    float32
    solve    k^3 / 3 + 2 o k^2           float64, k = kept columns
    reads    READS times the checkpoint  capture is compared (4), the walk (1), rewriting (1),
                                         FLOPs (2), verification (6), emission (8), writing (2)
    memory   largest weight + live activations + REPAIR Gram matrices
    network  2 * 4 d^2 bytes per consumer and rank (ring all-reduce of a float32 Gram matrix)

Rates are those that benchmarks/speed.py measured on one core, times --faster: a machine that does
matrix products n times as fast. Decoders of LLaMA's form; P counts their weights.

    python -m benchmarks.plan [--faster 1000] [--tokens 262144] [--disk 2e9]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path("benchmarks/results")
READS = 24
REPAIR = 10  # bytes of a repair over those of a float32 Gram matrix; benchmarks/memory.py


@dataclass(frozen=True)
class Shape:
    """A decoder: `kv` is the width of K and V."""

    name: str
    layers: int
    hidden: int
    ffn: int
    kv: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Weights of attention, gated MLP, embeddings and head."""
        attention = 2 * self.hidden * (self.hidden + self.kv)
        layer = attention + 3 * self.hidden * self.ffn
        return self.layers * layer + 2 * self.vocabulary * self.hidden

    @property
    def consumers(self) -> tuple[int, ...]:
        """Input widths of a layer's consumers: O, down."""
        return self.hidden, self.ffn


SHAPES = (
    Shape("70B", 80, 8192, 28672, 1024, 128256),
    Shape("400B", 126, 16384, 53248, 1024, 128256),
)


def row(shape: Shape, options: argparse.Namespace, rates: dict[str, float], multiple: float) -> str:
    """One line of the table."""
    tokens, fast = options.tokens, options.faster * options.ranks
    kept = [round(0.64 * d) for d in shape.consumers]
    gram = shape.layers * sum(tokens * d**2 for d in shape.consumers)
    solve = shape.layers * sum(k**3 / 3 + 2 * shape.hidden * k**2 for k in kept)
    hours = {
        "forward": multiple * 2 * shape.parameters * tokens / rates["float32"] / fast / 3600,
        "Gram": gram / rates["float32"] / fast / 3600,
        "solve": solve / rates["float64"] / options.faster / 3600,
        "read": READS * 4 * shape.parameters / options.disk / 3600,
    }
    largest = 4 * max(shape.hidden * shape.ffn, 2 * shape.hidden * shape.vocabulary)
    memory = largest + REPAIR * 4 * max(shape.consumers) ** 2
    live = 4 * tokens * (3 * shape.hidden + 2 * shape.ffn) / options.ranks
    network = shape.layers * sum(2 * 4 * d**2 for d in shape.consumers)
    cells = [
        shape.name,
        f"{4 * shape.parameters / 1e9:.0f} GB",
        *(f"{hours[k]:.2f} h" for k in ("forward", "Gram", "solve", "read")),
        f"{memory / 1e9:.0f} GB",
        f"{live / 1e9:.0f} GB",
        f"{network / 1e9:.0f} GB",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faster", type=float, default=1000.0)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    parser.add_argument("--disk", type=float, default=2e9, help="bytes per second")
    options = parser.parse_args()
    speed = json.loads((RESULTS / "speed.json").read_text())
    multiple = max(found["multiple"] for found in speed["rows"])
    print("| model | float32 | forward | Gram | solve | read | weights, repair | live | network |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        print(row(shape, options, speed["rates"], multiple))


if __name__ == "__main__":
    main()
