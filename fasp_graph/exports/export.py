"""export: a pruned model as a file that runs without this project.

onnx    ONNX Runtime; with `cache`, decoders take and return past_key_values under Optimum's names,
        and encoder-decoders become a folder of parts
pt2     torch.export.load(path).module()
aoti    compiled by AOTInductor for this machine: torch._inductor.aoti_load_package(path)

The weights are those that the class (`pruned.model`) holds now. Every file was run and compared
with the graph it was made of, and that with the class, before it appears at its path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import GraphModule

from passes.analysis import analysis
from passes.capture import Args, capture
from passes.errors import ConfigError
from passes.groups import DependencyGraph
from passes.kernels import narrow
from passes.precision import HALF, in_float32, is_half, widened, widened_inputs

from ..emit.current import current
from ..emit.dense import Twin, dense_shell, dense_twin
from ..folders.manifest import MANIFEST, read_manifest
from ..folders.origin import Loaded, origin_of
from ..jsontext import to_json
from ..targets import Target, example_inputs, folder_of
from .caching import CachedDecoder, cached_decoder
from .onnx import EXTERNAL_DATA_BYTES, Form, onnx_session, write_graph
from .onnx_language import session_perplexity
from .onnx_reduce import DTYPES
from .packages import save_aoti, save_pt2
from .parts import Parts, export_parts, parts_of

if TYPE_CHECKING:
    from ..prune import Pruned

FORMATS = ("onnx", "pt2", "aoti")


@dataclass(frozen=True)
class Exported:
    """What was written: `bytes` of all `files`; of a decoder with a cache, the bytes that a token
    takes in it, before and after pruning; the perplexity that ONNX Runtime measured, if asked.
    `max_error`: the largest difference to the graph that was seen when the file was compared,
    relative to the output's largest number.
    `uncut`: weights that keep their old size, with zeros, because the cache cannot follow.
    `model_dtype`: the half precision of the model's weights, where the file was made of a copy of
    them in float32.
    """

    format: str
    dtype: str
    path: str
    files: tuple[str, ...]
    bytes: int
    cache_bytes: int | None = None
    dense_cache_bytes: int | None = None
    perplexity: float | None = None
    uncut: tuple[str, ...] = ()
    max_error: float | None = None
    model_dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what was not measured is left out."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


@dataclass(frozen=True)
class Options:
    """For onnx only. `cache`: see above. `dtype`: float32, float16 or int8. `tokens` [N, T]: ONNX
    Runtime measures perplexity on them. Weights of more than `external_data_bytes` lie in a file
    of their own beside.
    """

    cache: bool = False
    dtype: str = "float32"
    tokens: Tensor | None = None
    external_data_bytes: int = EXTERNAL_DATA_BYTES

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"no dtype {self.dtype!r} · help: one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Source:
    """What can be exported: a graph, and the class and plan behind it where they are known."""

    graph_module: GraphModule
    inputs: Args
    dynamic_shapes: Any
    model: nn.Module
    deps: DependencyGraph | None = None
    plan: Mapping[str, Any] | None = None
    model_dtype: str | None = None

    def current(self) -> Source:
        """With the graph that the class is now."""
        held = (self.graph_module, self.model, self.inputs, self.dynamic_shapes)
        found = current(*held)
        return replace(
            self,
            graph_module=found.graph_module,
            inputs=found.inputs,
            dynamic_shapes=found.dynamic_shapes,
        )

    def in_float32(self) -> Source:
        """With a copy of weights that are in half precision, of which no runtime has all ops."""
        if not is_half(self.model) and not is_half(self.graph_module):
            return self
        return replace(
            self,
            graph_module=widened(self.graph_module),  # one weight at a time: `current` takes others
            model=in_float32(self.model),
            inputs=widened_inputs(self.inputs),
            model_dtype=_half_of(self.model),
        )

    def twin(self) -> Twin:
        """The dense form of the class; the class itself where its own code says the sizes."""
        if self.deps is None or self.plan is None:
            return Twin(self.model, {}, self.model)
        return dense_twin(self.model, self.deps, self.plan["kept"])

    @property
    def knows_dense(self) -> bool:
        """Whether the sizes before pruning are known; a class that was built at the pruned ones
        does not tell.
        """
        return self.plan is None or self.deps is not None

    @property
    def metadata(self) -> dict[str, str]:
        """The plan, where there is one; the half precision that the model's weights had."""
        found = {} if self.plan is None else {"fasp_graph.plan": to_json(self.plan)}
        return found | ({"fasp_graph.model_dtype": self.model_dtype} if self.model_dtype else {})


def _half_of(model: nn.Module) -> str | None:
    found = {held.dtype for held in model.parameters() if held.dtype in HALF}
    return min((str(dtype).removeprefix("torch.") for dtype in found), default=None)


def export(
    pruned: Pruned | nn.Module,
    path: str | os.PathLike[str],
    format: str = "onnx",
    inputs: Any = None,
    **options: Any,
) -> Exported:
    """Write a pruned model as `format` (onnx, pt2, aoti) and say what was written.

    A model that `load` or `recover` returned is captured first, at example `inputs`; for text and
    images they are made where none are given.
    Options, for onnx: `cache` (past_key_values; the parts of an encoder-decoder); `dtype` float32,
    float16 or int8 (weights of matrix products, quantised dynamically); `tokens` [N, T] to measure
    perplexity on; weights of more than `external_data_bytes` lie in a file of their own.
    Raises VerificationError, and writes nothing, if the file computes other numbers.
    """
    asked = Options(**options)
    if isinstance(pruned, nn.Module) or not hasattr(pruned, "deps"):
        source = _source_again(pruned, inputs, asked.cache)
    elif inputs is not None:
        raise ConfigError("a Pruned holds its inputs · help: leave inputs out, or give its .model")
    else:
        source = Source(
            pruned.graph_module,
            pruned.inputs,
            pruned.dynamic_shapes,
            pruned.model,
            pruned.deps,
            pruned.plan.to_dict(),
        )
    return export_source(source, Path(path), format, asked)


def _source_again(model: Any, inputs: Any, cache: bool) -> Source:
    """A model that `prune`, `load` or `recover` made, without the graph that it was made by."""
    origin = origin_of(model)
    if isinstance(origin, Loaded):
        given = example_inputs(model) if inputs is None else inputs
        return _captured(model, given, origin.manifest, cache)
    args, kwargs = origin.inputs
    told = {"plan": origin.plan.to_dict(), "emission": {"shapes": origin.emission.shapes}}
    return _captured(model, kwargs or args if inputs is None else inputs, told, cache)


def source_of(target: Target, cache: bool = False) -> Source:
    """A model of the command line, pruned or not. `cache`: it will be exported with its cache,
    which takes an analysis of the dense form.
    """
    folder, _ = folder_of(target.source)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    return _captured(target.model, target.inputs, manifest, cache)


def _captured(
    model: nn.Module, inputs: Any, manifest: Mapping[str, Any] | None, cache: bool
) -> Source:
    """Of a model and, where it was pruned, the manifest that says how."""
    found = capture(model, inputs)
    source = Source(found.graph_module, found.inputs, found.dynamic_shapes, model)
    if manifest is None:
        return source
    if not cache or not manifest["emission"]["shapes"]:  # no shapes: built at the pruned sizes
        return replace(source, plan=manifest["plan"])
    dense = capture(dense_shell(model), inputs)
    deps = analysis(dense.graph_module, dense.inputs)
    return replace(source, deps=deps, plan=manifest["plan"])


def export_source(source: Source, path: Path, format: str, options: Options) -> Exported:
    """The work of `export`, for models that were not pruned too."""
    if format not in FORMATS:
        raise ConfigError(f"no format {format!r} · help: one of {', '.join(FORMATS)}")
    if format == "onnx":
        source = source.in_float32()
    if not options.cache:  # with a cache, the graph is another, which is made of the class
        source = source.current()
    if format == "onnx":
        return _onnx(source, path, options)
    if options != Options():
        raise ConfigError(
            f"cache, dtype, tokens and external data belong to onnx, not to {format} · help: "
            "format='onnx'"
        )
    write = save_pt2 if format == "pt2" else save_aoti
    error = write(source.graph_module, source.inputs, source.dynamic_shapes, path)
    return _exported(source, path, format, options, error)


def _onnx(source: Source, path: Path, options: Options) -> Exported:
    form = Form(dtype=options.dtype, external_data_bytes=options.external_data_bytes)
    if not options.cache:
        plain = narrow(source.graph_module)
        given = (source.inputs, source.dynamic_shapes, path, source.metadata, form)
        return _exported(source, path, "onnx", options, write_graph(plain, *given))
    if not getattr(getattr(source.model, "config", None), "is_encoder_decoder", False):
        return _decoder(source, path, form, options)
    if options.tokens is not None:
        raise ConfigError(
            "an encoder-decoder in parts has no perplexity on tokens · help: leave out "
            "tokens (--data)"
        )
    parts = parts_of(source.twin(), source.inputs)
    error = export_parts(parts, path, source.metadata, form)
    return _exported(source, path, "onnx", options, error, parts)


def _decoder(source: Source, path: Path, form: Form, options: Options) -> Exported:
    decoder = cached_decoder(source.twin())
    named = replace(
        form,
        input_names=decoder.input_names,
        output_names=decoder.output_names,
        axes=decoder.axes,
        cases=decoder.cases(),
    )
    inputs: Args = (decoder.inputs, {})
    given = (inputs, decoder.dynamic_shapes, path, source.metadata, named)
    error = write_graph(decoder.graph_module, *given)
    return _exported(source, path, "onnx", options, error, decoder)


def _exported(
    source: Source,
    path: Path,
    format: str,
    options: Options,
    error: float,
    cache: CachedDecoder | Parts | None = None,
) -> Exported:
    beside = path.with_name(f"{path.name}.data")
    files = sorted(path.iterdir()) if path.is_dir() else [path, *[beside] * beside.is_file()]
    found = Exported(
        format,
        options.dtype,
        str(path),
        tuple(file.name for file in files),
        sum(file.stat().st_size for file in files),
        max_error=error,
        model_dtype=source.model_dtype,
    )
    if options.tokens is not None:
        figure = session_perplexity(onnx_session(path), options.tokens)
        found = replace(found, perplexity=figure)
    if cache is None:
        return found
    width = 2 if options.dtype == "float16" else cache.element_size
    dense = cache.dense_cache_numbers * width if source.knows_dense else None
    compact = cache.cache_numbers * width
    return replace(found, cache_bytes=compact, dense_cache_bytes=dense, uncut=cache.uncut)
