"""export: a pruned model as a file that runs without this project.

onnx    ONNX Runtime; with `cache`, decoders take and return past_key_values under Optimum's names,
        and encoder-decoders become a folder of parts
pt2     torch.export.load(path).module()
aoti    compiled by AOTInductor for this machine: torch._inductor.aoti_load_package(path)

Every file was run and compared with the graph it was made of before it appears at its path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import GraphModule

from passes.capture import Args
from passes.errors import ConfigError
from passes.groups import DependencyGraph
from passes.kernels import narrow

from .caching import CachedDecoder, cached_decoder
from .dense import Twin, dense_twin
from .jsontext import to_json
from .onnx import EXTERNAL_DATA_BYTES, Form, export_graph, onnx_session
from .onnx_language import session_perplexity
from .onnx_reduce import DTYPES
from .packages import save_aoti, save_pt2
from .parts import export_parts

if TYPE_CHECKING:
    from .prune import Pruned

FORMATS = ("onnx", "pt2", "aoti")


@dataclass(frozen=True)
class Exported:
    """What was written: `bytes` of all `files`; of a decoder with a cache, the bytes that a token
    takes in it, before and after pruning; the perplexity that ONNX Runtime measured, if asked.
    """

    format: str
    dtype: str
    path: str
    files: tuple[str, ...]
    bytes: int
    cache_bytes: int | None = None
    dense_cache_bytes: int | None = None
    perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what was not measured is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Source:
    """What can be exported: a graph, and the class and plan behind it where they are known."""

    graph_module: GraphModule
    inputs: Args
    dynamic_shapes: Any
    model: nn.Module
    deps: DependencyGraph | None = None
    plan: Mapping[str, Any] | None = None

    def twin(self) -> Twin:
        """The dense form of the class."""
        if self.deps is None or self.plan is None:
            return Twin(self.model, {})
        return dense_twin(self.model, self.deps, self.plan["kept"])


def export(
    pruned: Pruned,
    path: str | os.PathLike[str],
    format: str = "onnx",
    *,
    cache: bool = False,
    dtype: str = "float32",
    tokens: Tensor | None = None,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> Exported:
    """Write a pruned model as `format` and say what was written.

    For onnx only: `cache` (see above); `dtype` float32, float16 or int8 (weights of matrix
    products, quantised dynamically); `tokens` [N, T], on which ONNX Runtime measures perplexity;
    weights of more than `external_data_bytes` lie in a file of their own beside.
    """
    source = Source(
        pruned.graph_module,
        pruned.inputs,
        pruned.dynamic_shapes,
        pruned.model,
        pruned.deps,
        pruned.plan.to_dict(),
    )
    return export_source(
        source,
        Path(path),
        format,
        cache=cache,
        dtype=dtype,
        tokens=tokens,
        external_data_bytes=external_data_bytes,
    )


def export_source(
    source: Source,
    path: Path,
    format: str,
    *,
    cache: bool = False,
    dtype: str = "float32",
    tokens: Tensor | None = None,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> Exported:
    """The work of `export`, for models that were not pruned too."""
    if format not in FORMATS:
        raise ConfigError(f"no format {format!r} · help: one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise ConfigError(f"no dtype {dtype!r} · help: one of {', '.join(DTYPES)}")
    if format != "onnx":
        if cache or dtype != "float32" or tokens is not None:
            raise ConfigError(f"{format} has no cache, dtype or perplexity · help: format='onnx'")
        write = save_pt2 if format == "pt2" else save_aoti
        write(source.graph_module, source.inputs, source.dynamic_shapes, path)
        return _exported(format, dtype, path)
    metadata = {"fasp_graph.plan": to_json(source.plan)} if source.plan is not None else {}
    form = Form(dtype=dtype, external_data_bytes=external_data_bytes)
    if not cache:
        plain = narrow(source.graph_module)
        export_graph(plain, source.inputs, source.dynamic_shapes, path, metadata, form)
        return _exported(format, dtype, path, tokens)
    if getattr(getattr(source.model, "config", None), "is_encoder_decoder", False):
        if tokens is not None:
            raise ConfigError("an encoder-decoder in parts has no perplexity on tokens")
        export_parts(source.twin(), source.model, source.inputs, path, metadata, form)
        return _exported(format, dtype, path)
    decoder = cached_decoder(source.twin(), source.model)
    return _decoder(decoder, path, metadata, form, tokens)


def _decoder(
    decoder: CachedDecoder,
    path: Path,
    metadata: Mapping[str, str],
    form: Form,
    tokens: Tensor | None,
) -> Exported:
    named = replace(
        form,
        input_names=decoder.input_names,
        output_names=decoder.output_names,
        axes=decoder.axes,
        cases=decoder.cases(),
    )
    inputs: Args = (decoder.inputs, {})
    export_graph(decoder.graph_module, inputs, decoder.dynamic_shapes, path, metadata, named)
    bits = 16 if form.dtype == "float16" else 8 * decoder.inputs[2][0].element_size()
    compact = decoder.cache_numbers * bits // 8
    dense = decoder.dense_cache_numbers * bits // 8
    return _exported(
        "onnx", form.dtype, path, tokens, cache_bytes=compact, dense_cache_bytes=dense
    )


def _exported(format: str, dtype: str, path: Path, tokens: Tensor | None = None, **more: Any) -> Exported:
    files = sorted(path.iterdir()) if path.is_dir() else [path, *path.parent.glob(f"{path.name}.data")]
    figure = session_perplexity(onnx_session(path), tokens) if tokens is not None else None
    size = sum(file.stat().st_size for file in files)
    names = tuple(file.name for file in files)
    return Exported(format, dtype, str(path), names, size, perplexity=figure, **more)
