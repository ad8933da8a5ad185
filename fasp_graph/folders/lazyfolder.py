"""lazyfolder: a transformers model whose weights stay in their folder until an op needs them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import FaspGraphError
from passes.lazy import replace

from ..inputs import UNQUANTISED, quantised_by
from ..scale.skeleton import from_config
from .shards import Stored, folder_tensors

MMAP_THRESHOLD, LARGE = -3, 1 << 20  # M_MMAP_THRESHOLD of malloc.h; bytes


def open_folder(folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The transformers model in a folder, with lazy parameters, in eval mode."""
    import transformers

    root = Path(folder)
    held = folder_tensors(root)
    try:
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(root, **options)
        config.dtype = dtype
        model = from_config(config)
    except (OSError, ValueError, ImportError) as error:
        raise FaspGraphError(
            f"{root} cannot be opened: {str(error).splitlines()[0]} · help: streaming reads "
            "folders of transformers' own models; prune others in memory"
        ) from error
    if method := quantised_by(config):
        raise FaspGraphError(
            f"the weights in {root} are quantised ({method}) and cannot be cut or repaired · help: "
            f"{UNQUANTISED}"
        )
    if (root / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(root)
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    _promise_parameters(model, held, prefix, dtype, root)
    _read_buffers(model, held, prefix)
    return model


def _promise_parameters(
    model: nn.Module, held: dict[str, Stored], prefix: str, dtype: torch.dtype, root: Path
) -> None:
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)

    def promise(name: str, parameter: nn.Parameter) -> Tensor:
        found = _find(held, aliases[id(parameter)], prefix)
        if found is None or found.shape != tuple(parameter.shape):
            what = "lacks it" if found is None else f"holds it as {list(found.shape)}"
            raise FaspGraphError(
                f"parameter {name} {list(parameter.shape)}: {root} {what} · help: the folder must "
                "hold the weights as this version of transformers names and shapes them; load the "
                "model and save it again"
            )
        if parameter.is_floating_point() and not found.dtype.is_floating_point:
            raise FaspGraphError(
                f"parameter {name}: {root} holds it as {found.dtype}, which stands for other "
                f"numbers · help: {UNQUANTISED}"
            )
        return found.lazy(dtype if parameter.is_floating_point() else None)

    replace(model, promise)


def _read_buffers(model: nn.Module, held: dict[str, Stored], prefix: str) -> None:
    for name, buffer in model.named_buffers():
        found = _find(held, [name], prefix)
        if found is not None:
            buffer.copy_(found.read())


def _find(held: dict[str, Stored], names: list[str], prefix: str) -> Stored | None:
    """A tensor under one of its names; a checkpoint of the base model lacks the prefix."""
    for name in names:
        for said in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if said in held:
                return held[said]
    return None


def return_freed_memory() -> None:
    """Let the C library give large blocks back to the system when they are freed. glibc learns to
    keep them from the first one freed; where there is no mallopt, memory is that of the peak.
    """
    try:
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)
    except (OSError, AttributeError):
        return
