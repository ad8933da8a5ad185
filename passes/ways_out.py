"""ways_out: what can be done about a reason for which a group is not pruned as others are.

reason   what happened · node %n · module m · file.py:12 in f
way out  help: what to do, by the words of the reason; none where the axis is the model's own
         interface, or where the reason says it already
"""

from __future__ import annotations

_NEW = "compute a new tensor instead: torch.where, torch.cat"
_HEAD = "whole blocks may be a group of their own: kinds=head"
_WIDTH = "kinds=width prunes it all the same; what stays is then normalised anew"
WAYS_OUT = {
    "no axis rule for aten.": 'write it with other ops, or passes.rules.register("name", rule)',
    "no axis rule for cond": "compute both branches and choose by torch.where",
    "no axis rule for scan": "write the steps as a loop in forward, or as ops over the whole axis",
    "no axis rule for map_impl": "use torch.vmap, or an op over the whole axis",
    "no axis rule for while_loop": "write a loop of a fixed number of steps in forward",
    "no axis rule for": "passes.rules.probe finds a rule, passes.rules.register adds it",
    "each block has a single unit": _HEAD,
    "blocks of unequal size": "give every block (head, part) as many units",
    "nothing sums it away": "a layer that reads it, a product that sums over it, lets it go",
    "reaches the model's output": "its size is the model's interface; layers before it are pruned",
    "the complex weight": "hold its two parts as parameters and join them by torch.complex",
    "in each block": "whole units may go where the choice is made over all of them at once",
    "selected by": "give the positions that are taken one by one a layer of their own",
    "indexed by data": "index another axis, or multiply by a one-hot matrix",
    "written by an index": _NEW,
    "written by strides": _NEW,
    "writes through a view": _NEW,
    "draws numbers": "draw in the form of the tensor: torch.rand_like(h)",
}


def way_out(kind: str, reason: str) -> str:
    """`help: …` for a group of a kind and its reason; empty where the reason says it itself, and
    where nothing helps.
    """
    if not reason or "help: " in reason:
        return ""
    first = reason.split(" · ")[0]
    told = _WIDTH if kind == "width" else ""
    told = told or next((way for words, way in WAYS_OUT.items() if words in first), "")
    return f"help: {told}" if told else ""
