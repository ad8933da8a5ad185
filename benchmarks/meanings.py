"""meanings: what a number of a configuration is, by the words of its name."""

from __future__ import annotations

from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


WIDTH = _words(
    "hidden dim dims d embd embed emb embedding ffn ff inner channels units filters rank width "
    "planes intermediate projection latent latents feats feature dff scalar"
)
NOT_WIDTH = _words(
    "kernel window image patch vocab layers layer heads stride strides dilation position "
    "positions token tokens id ids index act ratio mult period dropout prob std eps epsilon "
    "length cardinality frames mel blocks depth depths padding loss scale temporal time group"
)
HEAD_WIDTH = _words("head_dim d_kv key_dim rotary_dim headdim head_size kv_channels v_head d_head")
LAYER = _words("layers layer depth depths blocks")
NOT_LAYER = _words(
    "feature period interval offset offsets step kernel size norm skip ratio act dropout id ids "
    "index indices mult scale init type types dense shared tpu max_depth separable"
)


def is_heads(name: str) -> bool:
    """A count of heads, KV heads or groups of them."""
    name = str(name)
    words = name.split("_")
    return (
        bool({"heads", "head", "ngroups"} & set(words))
        and not is_head_width(name)
        and (bool({"num", "n", "heads", "kv"} & set(words)))
        or name in ("num_key_value_heads", "num_query_groups", "mamba_n_groups", "n_groups")
    )


def is_head_width(name: str) -> bool:
    """The width of one head."""
    if name in HEAD_WIDTH or name.endswith(("head_dim", "d_head", "headdim", "head_size")):
        return True
    return "dim_head" in name


def shares(tree: dict[str, Any]) -> bool:
    """Whether the last layers use what earlier ones of their kind made."""
    return any(
        {"shared", "layers"} <= set(str(name).split("_")) and isinstance(value, int) and value > 0
        for name, value in tree.items()
    )


def is_layers(name: str) -> bool:
    """A count of layers."""
    words = set(name.split("_"))
    return bool(words & LAYER) and not words & NOT_LAYER and "heads" not in words
