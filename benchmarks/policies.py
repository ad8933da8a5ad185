"""policies: how far to shrink a configuration, in the order in which they are tried."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """How far to shrink. `width`: smallest hidden size to reach (0: leave all widths); `heads`:
    smallest count of heads and `groups` of KV heads; `head_width`: whether heads become narrower,
    or only fewer.
    """

    width: int = 32
    heads: int = 2
    groups: int = 2
    head_width: bool = True
    layers: int = 2
    vocabulary: bool = True
    positions: bool = True
    image: bool = True
    experts: bool = True
    equal_heads: bool = False  # `heads` heads everywhere
    fill: bool = False  # give a value to what the default configuration leaves at None


POLICIES = (
    Policy(),
    Policy(width=64),
    Policy(width=64, image=False),
    Policy(width=64, heads=4, layers=4, positions=False),
    Policy(width=64, head_width=False, image=False),
    Policy(width=64, groups=1, head_width=False, image=False),
    Policy(width=64, image=False, positions=False, equal_heads=True),
    Policy(width=64, positions=False, image=False, vocabulary=False),
    Policy(width=128, layers=4, positions=False, image=False, vocabulary=False, experts=False),
    Policy(fill=True),
    Policy(width=0, layers=2, positions=False, image=False),
    Policy(width=0, layers=8, positions=False, image=False, vocabulary=False, experts=False),
)
