"""Smaller numbers in an ONNX file: float16 throughout, or int8 weights.

float16   weights, activations, inputs, outputs and so the cache; norms stay float32, as in torch;
          a constant beyond 65504 is clamped
int8      dynamic quantisation: per-tensor int8 weights of matrix products, activations quantised as
          they come; everything else stays float32
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from passes.errors import ConfigError

if TYPE_CHECKING:
    from onnx import ModelProto

_WIDE = ("Pow", "ReduceMean", "Sqrt", "Reciprocal")  # of norms: a square leaves float16 soon
DTYPES = ("float32", "float16", "int8")


def reduce(path: Path, dtype: str, external: bool) -> None:
    """Rewrite the file at `path`; with `external`, its weights stay in a file beside it."""
    import onnx

    if dtype not in DTYPES:
        raise ConfigError(f"no dtype {dtype!r} · help: one of {', '.join(DTYPES)}")
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    found = _float16(model) if dtype == "float16" else _int8(path, model)
    onnx.helper.set_model_props(found, metadata)
    for file in path.parent.iterdir():
        file.unlink()
    if external:
        onnx.save(found, path, save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save(found, path)


def _float16(model: ModelProto) -> ModelProto:
    import onnx_ir
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    found: ModelProto = convert_float_to_float16(
        model, max_finite_val=65504.0, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_WIDE]
    )
    ordered = onnx_ir.from_proto(found)
    ordered.graph.sort()  # the converter appends its casts at the end
    return onnx_ir.to_proto(ordered)


def _int8(path: Path, model: ModelProto) -> ModelProto:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    del model.graph.value_info[:]  # shapes under names of axes that the quantiser cannot match
    made = path.with_name(f"int8-{path.name}")
    quantize_dynamic(model, made, weight_type=QuantType.QInt8)
    return onnx.load(made)
