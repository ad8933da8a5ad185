"""Config: all options of a pruning run, frozen; the command line's flags are its fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from passes.errors import ConfigError
from passes.restore import RESTORES
from passes.score import SCORES

METHODS: dict[str, tuple[str, str]] = {
    "fasp": ("fasp", "fasp"),
    "magnitude": ("magnitude", "none"),
    "wanda": ("fasp", "none"),
    "flap": ("flap", "bias"),
    "random": ("random", "none"),
}
KINDS = ("chain", "bilinear")
LAYOUTS = ("free", "uniform")


@dataclass(frozen=True)
class Config:
    """Options of `prune`.

    sparsity   removed share of the parameters in scope (passes/select.py)
    method     preset of (score, restore): fasp, magnitude, wanda, flap, random
    score      overrides the method's score: fasp, wanda_l2, magnitude, flap, random
    restore    overrides the method's repair: none, bias, fasp, affine
    kinds      kinds of groups to prune; bilinear (Q and K) is scored by weight magnitude and
    cannot be repaired
    align      kept counts of unblocked groups are multiples of this
    min_keep   units that every block keeps at least
    ridge      the repair's ridge, relative to the mean of the Gram matrix's diagonal
    layout     free: every group keeps what it should; uniform: only groups whose size a field of
    the model's configuration says, equally many units for all groups of a field, so that a plain
    from_pretrained loads the result
    seed       for score=random and the inputs of the verification
    check      check after every op of the analysis that no axis lost its labels
    """

    sparsity: float = 0.3
    method: str = "fasp"
    score: str | None = None
    restore: str | None = None
    kinds: tuple[str, ...] = ("chain",)
    align: int = 1
    min_keep: int = 1
    ridge: float = 1e-2
    layout: str = "free"
    seed: int = 0
    check: bool = False

    def __post_init__(self) -> None:
        _one_of("method", self.method, tuple(METHODS))
        _one_of("score", self.score, (None, *SCORES))
        _one_of("restore", self.restore, (None, *RESTORES))
        _one_of("layout", self.layout, LAYOUTS)
        for kind in self.kinds:
            _one_of("kinds", kind, KINDS)
        if not 0 < self.sparsity < 1:
            raise ConfigError(f"sparsity={self.sparsity} must lie between 0 and 1, both excluded")
        if self.align < 1 or self.min_keep < 1 or self.ridge < 0:
            raise ConfigError("align and min_keep must be at least 1, ridge at least 0")

    @property
    def passes(self) -> tuple[str, str]:
        """The (score, restore) that run."""
        score, restore = METHODS[self.method]
        return self.score or score, self.restore or restore


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name}={value!r} is unknown · help: one of {', '.join(map(str, allowed))}"
        )
