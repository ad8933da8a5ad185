"""Config: all options of a pruning run, frozen; the command line's flags are its fields."""

from __future__ import annotations

import math
import numbers
import types
import typing
from dataclasses import dataclass
from typing import Any

from passes.allocate import ALLOCATIONS
from passes.errors import ConfigError
from passes.restore import RESTORES
from passes.score import GREEDY, SCORES


@dataclass(frozen=True)
class Passes:
    """score (passes/score.py), restore (passes/restore.py), allocation (passes/allocate.py)."""

    score: str
    restore: str
    allocation: str = "uniform"


METHODS: dict[str, Passes] = {
    "best": Passes("rotation", "outputs", "sensitivity"),
    "fasp": Passes("fasp", "fasp"),
    "slimgpt": Passes("obs", "obs"),
    "modegpt": Passes("modegpt", "obs", "influence"),
    "flap": Passes("flap", "bias", "standardised"),
    "wanda": Passes("fasp", "none"),
    "magnitude": Passes("magnitude", "none"),
    "random": Passes("random", "none"),
}
RIDGE, HELD_OUT = 1e-2, "held-out"
KINDS = ("chain", "bilinear", "head", "width")
LAYOUTS = ("free", "uniform")
BUDGETS = ("parameters", "latency")


@dataclass(frozen=True)
class Config:
    """Options of `prune`.

    Attributes:
        sparsity: removed share of the parameters in scope, which are all of the layers that a
            chain, bilinear or head group goes through, pruned or not. The share of the whole model
            is smaller: of a language model embeddings, norms and output head are not in scope.
        method: preset of score, restore and allocation: best; fasp, slimgpt, modegpt, flap,
            wanda, magnitude and random from the literature (docs/accuracy.md).
        score: overrides the method's score: obs, fasp, wanda_l2, magnitude, flap, taylor,
            numerical, random; rotation and modegpt, which also turn groups where nothing but linear
            ops stand between producers and consumers.
        restore: overrides the method's repair: none, bias, fasp, obs, affine, asymmetric,
            residual, outputs.
        allocation: overrides how the sparsity is spread over groups: uniform, sensitivity, curves,
            standardised, influence.
        kinds: kinds of groups to prune: chain, bilinear (Q and K, scored by weight magnitude, not
            repaired), head (whole heads, KV groups, experts), width (the residual stream: not
            exact, since norms then see fewer channels).
        align: what a group keeps of all its blocks together is a multiple of this.
        min_keep: units that every block keeps at least.
        ridge: the repair's ridge, relative to the mean of the Gram matrix's diagonal; or held-out:
            for every weight the best on a quarter of its calibration tokens, when it is fitted to
            the others.
        layout: free, where every group keeps what it should, or uniform: only groups whose size a
            field of the model's configuration says, equally many units for all groups of a field,
            so that a plain from_pretrained loads the result.
        budget: what the sparsity is a share of: parameters; or latency, where it is the removed
            share of the time that the ops of the layers in scope take by themselves, measured at
            the sizes of the first calibration batch, on this machine, so that plans differ from
            run to run. Good with align=8, 16 or 32.
        seed: for score=random and the inputs of the verification.
        max_memory: bytes of live activations to hold on each device and in memory, of batches that
            wait; more goes from a device to memory, from there to files in the folder for temporary
            files. Without it all of them are held.
        compute_on: devices, say cuda:0,cuda:1, that the layers are spread over in order, as many
            bytes of weights on each. The model stays where it is; each weight is copied when its
            layer runs. Without it everything runs where the model is.
        check: check after every op of the analysis that no axis lost its labels.
    """

    sparsity: float = 0.3
    method: str = "best"
    score: str | None = None
    restore: str | None = None
    allocation: str | None = None
    kinds: tuple[str, ...] = ("chain",)
    align: int = 1
    min_keep: int = 1
    ridge: float | str = RIDGE
    layout: str = "free"
    budget: str = "parameters"
    seed: int = 0
    max_memory: int | None = None
    compute_on: tuple[str, ...] = ()
    check: bool = False

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(Config).items():
            if not _fits(held := getattr(self, name), hint):
                raise ConfigError(
                    f"{name}={held!r} has the wrong type: {type(held).__name__}, where "
                    f"{_in_words(hint)} is expected · help: Config({name}=...), in a file {name} = "
                    f"..., on the command line --{name.replace('_', '-')}"
                )
        _one_of("method", self.method, tuple(METHODS))
        _one_of("score", self.score, (None, *SCORES))
        _one_of("restore", self.restore, (None, *RESTORES))
        _one_of("allocation", self.allocation, (None, *ALLOCATIONS))
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("budget", self.budget, BUDGETS)
        for kind in self.kinds:
            _one_of("kinds", kind, KINDS)
        if self.passes.allocation == "standardised" and self.passes.score in GREEDY:
            raise ConfigError(
                f"allocation=standardised compares scores of single units, and score="
                f"{self.passes.score} has none: its units go one after the other · help: "
                "allocation='curves', or score='flap'"
            )
        if not 0 < self.sparsity < 1:
            raise ConfigError(
                f"sparsity={self.sparsity} must lie between 0 and 1, both excluded · help: it is a "
                "share: 0.3 removes 30% of the parameters in scope"
            )
        if self.max_memory is not None and self.max_memory < 1:
            raise ConfigError(
                f"max_memory={self.max_memory} is no number of bytes above 0 · help: say "
                "2000000000 for 2 GB, or leave it out to hold all activations in memory"
            )
        if isinstance(self.ridge, str):
            _one_of("ridge", self.ridge, (HELD_OUT,), "or a number")
        for name, low in (("align", 1), ("min_keep", 1), ("ridge", 0)):
            held = getattr(self, name)
            if not isinstance(held, str) and held < low:
                raise ConfigError(
                    f"{name}={held} is too small · help: at least {low}; the default is "
                    f"{getattr(Config, name)}"
                )

    @property
    def damping(self) -> float:
        """The ridge where units are chosen."""
        return RIDGE if isinstance(self.ridge, str) else self.ridge

    @property
    def passes(self) -> Passes:
        """The score, restore and allocation that run."""
        preset = METHODS[self.method]
        return Passes(
            self.score or preset.score,
            self.restore or preset.restore,
            self.allocation or preset.allocation,
        )


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is what a field's annotation says; numbers are finite, and no booleans."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return isinstance(value, (tuple, list, set)) and all(_fits(v, kind) for v in value)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    """What a field's annotation asks for, as a user would say it."""
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_in_words, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a tuple of which each is {_in_words(typing.get_args(hint)[0])}"
    words = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False"}
    return words.get(hint, "None" if hint is types.NoneType else str(hint))


def _one_of(name: str, value: Any, allowed: tuple[Any, ...], more: str = "") -> None:
    if value not in allowed:
        known = ", ".join(str(held) for held in allowed if held is not None)
        raise ConfigError(f"{name}={value!r} is unknown · help: one of {known} {more}".rstrip())
