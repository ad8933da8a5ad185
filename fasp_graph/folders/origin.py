"""origin: what a smaller model knows of how it was made, so that it can be saved again.

Weights alone do not tell it, and the `save_pretrained` of the model's class would write them with
a configuration that builds other shapes. So each model that `prune` or `load` returns carries its
own: it writes what `save` writes, into a folder that may hold other files (a Trainer's).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from passes.capture import Args
from passes.errors import FaspGraphError

from ..emit.emission import Emission
from .manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    from passes.select import Plan

    from ..config import Config
    from ..prune import Pruned
    from ..report import Report

_IDLE = ("token", "safe_serialization", "save_peft_format", "save_original_format")
_SAME = ("class", "aliases", "emission", "plan")


@dataclass(frozen=True)
class Pruning:
    """A pruning in this process: of a `Pruned` what a folder tells, and what its configuration is
    tried with: the example inputs and the shapes of the parameters before.
    """

    plan: Plan
    report: Report
    config: Config
    emission: Emission
    inputs: Args
    parameters: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(pruned: Pruned) -> Pruning:
        """What is left without the graph, the analysis and the model."""
        held = (pruned.plan, pruned.report, pruned.config, pruned.emission, pruned.inputs)
        return Pruning(*held, pruned.deps.parameters)


@dataclass(frozen=True)
class Loaded:
    """The folder that a model was loaded from, and what its manifest said then."""

    folder: Path
    manifest: Mapping[str, Any]

    def again(self) -> dict[str, Any]:
        """The manifest, where the folder still holds that pruning."""
        kept = (self.folder / MANIFEST).is_file()
        manifest = read_manifest(self.folder) if kept else {}
        if any(manifest.get(key) != self.manifest.get(key) for key in _SAME):
            raise FaspGraphError(
                f"{self.folder} holds another pruning than when the model was loaded from it, or "
                "none · help: load the model again"
            )
        return manifest


class Saving:
    """`save_pretrained` of one model; a copy of the model gets a copy of it."""

    def __init__(self, model: nn.Module, origin: Pruning | Loaded) -> None:
        self.model, self.origin = weakref.ref(model), origin  # no cycle that keeps weights alive

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        **options: Any,
    ) -> None:
        """Write the model as `fasp_graph.save` does, beside whatever the folder holds."""
        from .huggingface import save_into

        asked = [name for name, value in options.items() if value and name not in _IDLE]
        model = self.model()
        if model is None:
            raise FaspGraphError(
                "the model is gone, since nothing holds it while it is saved · help: keep it in a "
                "variable (model = load(folder); model.save_pretrained(...)), or fasp_graph.save it"
            )
        if asked or options.get("safe_serialization") is False:
            said = ", ".join(asked) or "weights but safetensors"
            raise FaspGraphError(
                f"save_pretrained of a pruned model writes no {said} · help: leave it out; "
                "fasp_graph.push_to_hub uploads a folder"
            )
        if is_main_process:
            save_into(model, self.origin, Path(save_directory), state_dict, max_shard_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> Saving:
        copied = memo.get(id(self.model()))
        return Saving(copied, self.origin) if isinstance(copied, nn.Module) else self

    def __reduce__(self) -> tuple[Any, ...]:
        return Saving, (self.model(), self.origin)


def remember(model: nn.Module, origin: Pruning | Loaded) -> nn.Module:
    """`model`, which can say from now on how it was made."""
    model.save_pretrained = Saving(model, origin)  # type: ignore[assignment]
    return model


def origin_of(model: object) -> Pruning | Loaded:
    """How a model was made, or a FaspGraphError that says what to give instead."""
    found = vars(model).get("save_pretrained") if isinstance(model, nn.Module) else None
    if not isinstance(found, Saving):
        raise FaspGraphError(
            f"{type(model).__name__} is no result of prune, load or recover, so that nothing says "
            "how it was pruned · help: give one of these; of a model that was not pruned, the "
            "class's own save_pretrained, or fasp-graph export on the command line"
        )
    return found.origin
