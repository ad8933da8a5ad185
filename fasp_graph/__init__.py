"""fasp_graph: a structured-pruning compiler for any PyTorch model.

deps = analyze(model, inputs)                             # which layers go together, and why
pruned = prune(model, inputs, calibration, Config(sparsity=0.3))
save(pruned, folder); load(folder); export_onnx(pruned, path)
export(pruned, path, format)                              # onnx with a cache, float16...; pt2
"""

import fasp_graph_entry as fasp_graph_entry  # first: it tells of an interrupt while others load
from passes.couple import DependencyGraph
from passes.errors import FaspGraphError

from .config import Config
from .evaluate import perplexity
from .exports.export import Exported, export
from .exports.onnx import export_onnx
from .folders import auto as auto  # transformers' Auto classes then load folders of this kind
from .folders.huggingface import load, push_to_hub, save
from .prune import Pruned, analyze, prune
from .recover import recover
from .scale.streaming import prune_folder

__all__ = [
    "Config",
    "DependencyGraph",
    "Exported",
    "FaspGraphError",
    "Pruned",
    "analyze",
    "export",
    "export_onnx",
    "load",
    "perplexity",
    "prune",
    "prune_folder",
    "push_to_hub",
    "recover",
    "save",
]
