"""The command that trains a pruned folder: recover."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from passes.errors import ConfigError

from ..data import calibration_batches, load_target
from ..evaluate import perplexity
from ..folders.huggingface import MANIFEST, refuse_foreign, save
from ..targets import folder_of
from ..training import Training, train
from .terminal import (
    DATA_HELP,
    Debug,
    Json,
    Length,
    Windows,
    known_models,
    show,
    stages,
    writable_folder,
)


def recover_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `prune` wrote.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help=f"What to train on: {DATA_HELP}.")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(metavar="DATA", help="Text to measure perplexity on.")
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model, to learn from.",
            autocompletion=known_models,
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to train on; without it, the data once.", min=1)
    ] = None,
    lora: Annotated[int, typer.Option(help="Rank of LoRA; 0: train all weights.", min=0)] = 8,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3,
    length: Length = 256,
    windows: Windows = 512,
    seed: int = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a pruned FOLDER for a short while, by LoRA, on text or towards the dense model."""
    root, _ = folder_of(str(folder))
    if not (root / MANIFEST).is_file():
        raise ConfigError(f"{folder} is no folder that prune wrote · help: prune --output first")
    writable_folder(output)
    refuse_foreign(output)
    if data is None and distill is None:
        raise _idle()
    with stages("load") as progress:
        target = load_target(str(folder), length=length, count=windows, evaluation=evaluation)
        dense = load_target(distill) if distill else None
        batches = calibration_batches(target, data, length, windows) if data else []
        if dense is not None and not batches:
            batches = dense.calibration
        if not batches:
            raise _idle()
        figures: dict[str, Any] = {}
        if target.heldout is not None:
            figures["perplexity_before"] = perplexity(target.model, target.heldout)
        teacher = dense.model if dense else None
        options = Training(tokens, lora, teacher, learning_rate=learning_rate, seed=seed)
        trained = train(target.model, batches, options, progress)
        if target.heldout is not None:
            figures["perplexity_after"] = perplexity(trained.model, target.heldout)
    course = ("steps", "tokens", "loss_first", "loss_last")
    figures |= {name: getattr(trained, name) for name in course}
    figures["folder"] = str(save(trained.model, output))
    show(figures, json)


def _idle() -> ConfigError:
    return ConfigError(
        "there is nothing to train on · help: --data DATA, or --distill MODEL of a model that "
        "comes with calibration data"
    )
