"""shrink: the default configuration of a transformers model type, made small.

Every number of a configuration is a width, a count of heads, the width of a head, a count of
layers, of experts, of positions, of words, a token id, or none of these; its name's words say
which. With s = s_h * s_d (powers of two)

    width -> width / s        heads -> heads / s_h        width of a head -> width / s_d

every product that a model's code relies on (heads * head width = width) goes on holding. The rules
know no model: a policy that does not build or run gives way to the next, less thorough one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from transformers import ResNetConfig

from .meanings import NOT_WIDTH, WIDTH, is_head_width, is_heads, is_layers, shares
from .policies import Policy

REFERENCE = (
    "hidden_size",
    "d_model",
    "n_embd",
    "embed_dim",
    "dim",
    "hidden_dim",
    "hidden_sizes",
    "emb_dim",
)
ABSENT = {"num_experts_per_tok": 2, "prediction_length": 8, "num_experts_per_token": 2}
VOCABULARY, WORDS = 128, 100  # ids from WORDS on are special tokens


def shrunk(config: Any, policy: Policy) -> Any:
    """A new configuration of the same class, made small by `policy`."""
    scale = _scale(config.to_dict(), policy)
    return _rebuilt(config, _Shrink(policy, scale))


def _rebuilt(config: Any, shrink: _Shrink) -> Any:
    """Only what the constructor takes is passed: derived attributes are computed anew."""
    plain = shrink.mapping(_own(config))
    for name, value in vars(config).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            plain[name] = _rebuilt(_own_library(value), shrink)
    stages = getattr(config, "out_indices", None)
    if stages and getattr(config, "stage_names", None):
        plain["out_indices"] = shrink.stages(
            list(stages), len(config.stage_names) - 1, _own(config)
        )
    return type(config)(**{k: v for k, v in plain.items() if not _is_derived(type(config), k)})


def _is_derived(cls: type, name: str) -> bool:
    """A property that cannot be set."""
    held = getattr(cls, name, None)
    return isinstance(held, property) and held.fset is None


def _own_library(config: Any) -> Any:
    """A backbone of a library that is not installed gives way to a ResNet of transformers."""
    if not config.model_type.startswith("timm") or find_spec("timm"):
        return config
    return ResNetConfig(
        out_indices=[k for k in getattr(config, "out_indices", None) or [4] if k > 0]
    )


def _own(config: Any) -> dict[str, Any]:
    names = (
        {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else None
    )
    skip = {"id2label", "label2id", "transformers_version", "architectures", "dtype"}
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_")
        and name not in skip
        and (names is None or name in names)
        and not hasattr(value, "to_dict")
    }


def _scale(tree: dict[str, Any], policy: Policy) -> int:
    found = [v for v in _references(tree) if v >= 16]
    scale = 1
    while policy.width and found and min(found) // (scale * 2) >= policy.width:
        scale *= 2
    return scale if policy.head_width else min(scale, _head_scale(tree, scale, policy))


def _head_scale(tree: dict[str, Any], largest: int, policy: Policy) -> int:
    """s_h for all configurations of the tree at once."""
    found = [_head_scale(v, largest, policy) for v in tree.values() if isinstance(v, dict)]
    if any(is_heads(name) and isinstance(value, (int, list)) for name, value in tree.items()):
        found.append(_Shrink(policy, largest).heads(tree))
    return min(found, default=largest)


def _references(tree: dict[str, Any]) -> Iterator[int]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _references(value)
        elif name in REFERENCE:
            values = value if isinstance(value, (list, tuple)) else [value]
            yield from (v for v in values if isinstance(v, int) and not isinstance(v, bool))


class _Shrink:
    """One policy at one scale; `ids` keeps equal token ids equal over all sub-configurations."""

    def __init__(self, policy: Policy, scale: int) -> None:
        self.policy, self.scale = policy, scale
        self.ids: dict[int, int] = {}

    def mapping(self, tree: dict[str, Any]) -> dict[str, Any]:
        heads = self.heads(tree)
        kept = self._kept_layers(tree)
        small = {name: self.value(name, value, heads, kept) for name, value in tree.items()}
        small |= self._head_width(small)
        return small | self._filled(small) if self.policy.fill else small

    def _head_width(self, small: dict[str, Any]) -> dict[str, Any]:
        """A width of heads that is left open is said where hidden size / heads gets too small."""
        heads, width = small.get("num_attention_heads"), small.get("hidden_size")
        said = any(is_head_width(str(name)) for name in small)
        if said or not isinstance(heads, int) or not isinstance(width, int) or width // heads >= 4:
            return {}
        return {"head_dim": 4}

    def _filled(self, small: dict[str, Any]) -> dict[str, Any]:
        """What a configuration leaves open though its model does not: the usual meaning of it."""
        heads, width = small.get("num_attention_heads"), small.get("hidden_size")
        if not isinstance(heads, int) or not isinstance(width, int):
            return {}
        usual = {"num_key_value_heads": heads, "head_dim": width // heads}
        usual |= dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 8)
        return {name: usual[name] for name in usual if small.get(name, 0) is None}

    def heads(self, tree: dict[str, Any]) -> int:
        """s_h: all head counts above one stay at two or more."""
        counts = []
        for name, value in tree.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            if is_heads(name):
                short = "kv" if "key" in name or "kv" in name else "q"
                counts += [(short, v) for v in values if isinstance(v, int) and v > 1]
        scale = 1
        while (
            scale * 2 <= self.scale
            and counts
            and all(
                v % (scale * 2) == 0
                and v // (scale * 2)
                >= min(self.policy.heads, self.policy.groups if "kv" in n else v)
                for n, v in counts
            )
        ):
            scale *= 2
        return scale

    def stages(self, chosen: list[int], count: int, tree: dict[str, Any]) -> list[int]:
        """The outputs of a backbone: as many as before, from the layers that stay."""
        total, kept = self._kept_layers(tree)
        if count != total or not kept:
            return chosen
        most = len(kept) + 1  # the stem is a stage
        return list(range(most - min(len(chosen), most), most))

    def _kept_layers(self, tree: dict[str, Any]) -> tuple[int, list[int]]:
        """The old count of layers and those that stay: every kind of layer is among them."""
        counts = [v for n, v in tree.items() if is_layers(n) and isinstance(v, int) and v > 2]
        named = tree.get("num_hidden_layers")
        total = named if isinstance(named, int) and named > 2 else max(counts, default=0)
        first: dict[str, int] = {}
        last: dict[str, int] = {}  # those that share what an earlier one made
        for value in tree.values():
            if isinstance(value, list) and len(value) == total:
                for position, kind in enumerate(value):
                    first.setdefault(str(kind), position)
                    last[str(kind)] = position
        found = {*first.values(), *(last.values() if shares(tree) else ())}
        chosen = sorted(found)[: 2 * self.policy.layers + 2] if len(first) < 8 else []
        for position in range(total):
            if len(chosen) >= self.policy.layers:
                break
            if position not in chosen:
                chosen.append(position)
        return total, sorted(chosen)

    def value(self, name: str, value: Any, heads: int, kept: tuple[int, list[int]]) -> Any:
        """The small form of one attribute."""
        total, chosen = kept
        if isinstance(value, (list, tuple)):
            return self._list(name, list(value), heads, kept)
        if isinstance(value, dict):
            inner = {k: self.value(str(k), v, heads, kept) for k, v in value.items()}
            return inner if name not in ("id2label", "label2id") else value
        if value is None and name in ABSENT:
            return ABSENT[name]
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if shares({name: value}):
            return min(value, max(1, len(chosen) // 2))
        if is_layers(name):
            return len(chosen) if value == total and chosen else min(value, self.policy.layers)
        return self._number(name, value, heads)

    def _number(self, name: str, value: int, heads: int) -> int:
        words = set(name.split("_"))
        if "token" in words or name.endswith(("_id", "_token_index")) or name.endswith("pad_idx"):
            return self._token(value)
        if "vocab" in words or name in ("codebook_size", "num_embeddings", "n_words"):
            return min(value, VOCABULARY) if self.policy.vocabulary else value
        if words & {"experts", "expert"} and words & {"num", "n"}:
            return self._experts(name, value)
        if words & {"topk", "top"} and words & {"k", "group", "moe", "topk"}:
            return min(value, 1 if "group" in words else 2) if self.policy.experts else value
        if name in ("n_group", "num_expert_group"):
            return min(value, 2) if self.policy.experts else value
        if words & {"positions", "position"} and words & {"max", "n"}:
            return min(value, 128) if self.policy.positions else value
        if words & {"period", "interval", "step", "frequency"} and 2 < value < 64:
            return 2
        if name == "first_k_dense_replace" or ("offset" in words and 1 < value < 64):
            return 1
        if name in ("image_size", "img_size"):
            return self._image(value)
        if is_heads(name):
            if self.policy.equal_heads:
                return min(value, self.policy.heads)
            return max(1, value // heads)
        if is_head_width(name):
            return max(4, value // (self.scale // heads)) if value > 4 else value
        return self._width(name, value)

    def _experts(self, name: str, value: int) -> int:
        if not self.policy.experts:
            return value
        return min(value, 2 if {"per", "tok", "shared"} & set(name.split("_")) else 8)

    def _width(self, name: str, value: int) -> int:
        words = set(name.split("_"))
        if words & WIDTH and not words & NOT_WIDTH and value > 16:
            return max(8, value // self.scale)
        return value

    def _image(self, value: int) -> int:
        if not self.policy.image:
            return value
        for size in (64, 56, 32, 96, 128):
            if value % size == 0 and value >= size:
                return size
        return value

    def _token(self, value: int) -> int:
        if value < WORDS or not self.policy.vocabulary:
            return value
        return self.ids.setdefault(value, VOCABULARY - 1 - len(self.ids))

    def _list(
        self, name: str, value: list[Any], heads: int, kept: tuple[int, list[int]]
    ) -> list[Any]:
        total, chosen = kept
        words = set(name.split("_"))
        if "section" in words or name in ("short_factor", "long_factor"):
            factor = self.scale // heads
            if all(isinstance(v, int) for v in value):
                ends = [end // factor for end in itertools.accumulate(value)]
                return [high - low for low, high in itertools.pairwise([0, *ends])]
            return value[: max(1, len(value) // factor)]
        if words & {"indexes", "indices", "idx", "idxs", "ids"} or words == {"moe", "layers"}:
            if "token" in words:
                return [self._token(v) for v in value if isinstance(v, int)]
            if chosen and len(value) == len(chosen):
                return list(range(len(chosen)))
            mapped = [chosen.index(v) for v in value if v in chosen]
            return mapped or ([len(chosen) - 1] if chosen and value else value)
        if total and len(value) == total and chosen:
            return [self._item(name, value[k], heads, kept) for k in chosen]
        if is_layers(name) or words & {"repeats"}:
            return [min(v, self.policy.layers) if isinstance(v, int) else v for v in value]
        return [self._item(name, v, heads, kept) for v in value]

    def _item(self, name: str, value: Any, heads: int, kept: tuple[int, list[int]]) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return self._number(name, value, heads)
        return self.value(name, value, heads, kept) if isinstance(value, (list, dict)) else value
