"""Where calibration and evaluation data come from: a text -> text, or batches.

wikitext2, c4, ptb          the usual corpora with their usual splits, by `datasets`
owner/name                  any data set of the hub that has a column `text`
FILE.txt .jsonl .parquet    a file; jsonl and parquet by their column `text`
FOLDER                      all such files in it, in the order of their names; or images
package.module:factory      a function that returns an iterable of batches like the inputs
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.errors import CalibrationError, FaspGraphError

from .network import offline_without_network

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"})
TABLES = frozenset({".jsonl", ".json", ".parquet"})
TEXTS = frozenset({".txt", ".md", ".py", ".rst"})
BYTES = 20_000_000  # of text at most: more than any calibration or perplexity run takes
NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ufffd]")  # control characters; not UTF-8
MOST = 0.01  # of the characters of a text may be such


@dataclass(frozen=True)
class Corpus:
    """A data set of the hub with its usual splits for calibration and for perplexity."""

    path: str
    options: dict[str, Any]
    calibration: str
    evaluation: str
    column: str = "text"


CORPORA = {
    "wikitext2": Corpus("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}, "train", "test"),
    "c4": Corpus(
        "allenai/c4",
        {
            "data_files": {
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            }
        },
        "train",
        "validation",
    ),
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        {"revision": "refs/convert/parquet"},
        "train",
        "test",
        "sentence",
    ),
}


def text_of(source: str, evaluation: bool = False) -> str:
    """The text that `source` names, at most BYTES characters of it."""
    path = Path(source)
    if path.is_dir():
        return _joined(_folder(path), source)
    if path.suffix.lower() in IMAGES:
        raise CalibrationError(f"{source} is an image, not text · help: give a text file")
    if path.exists() or _is_path(source):
        return _joined(_file(path), source)
    return _joined(_hub(source, evaluation), source)


def refuse_missing(source: str) -> None:
    """CalibrationError if `source` names a file or folder that is not there."""
    if _is_path(source) and not Path(source).exists():
        raise CalibrationError(
            f"cannot read {source}: no such file or folder · help: paths count from the working "
            "folder"
        )


def _is_path(source: str) -> bool:
    return bool(Path(source).suffix) or source.startswith((".", os.sep, "~"))


def _joined(pieces: Iterable[str], source: str) -> str:
    found, size = [], 0
    for piece in pieces:
        found.append(piece)
        size += len(piece.strip() and piece)
        if size >= BYTES:
            break
    if not size:
        raise CalibrationError(f"{source} holds no text: {_lacking(Path(source))}")
    return "\n\n".join(found)


def _lacking(path: Path) -> str:
    if path.is_dir():
        endings = ", ".join(sorted(TABLES | TEXTS))
        return f"no file with text in it ends in {endings} · help: rename or convert its files"
    reason = "it is empty" if path.exists() else "no rows came"
    return f"{reason} · help: give a file with text in it"


def _folder(path: Path) -> Iterator[str]:
    for held in sorted(p for p in path.rglob("*") if p.is_file()):
        if held.suffix.lower() in TABLES | TEXTS:
            yield from _file(held)


def _file(path: Path) -> Iterator[str]:
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet(path)
        elif path.suffix.lower() in TABLES:
            yield from _lines(path)
        else:
            yield _text(path)
    except OSError as error:
        raise CalibrationError(
            f"cannot read {path}: {error.strerror or error} · help: give a file that can be read"
        ) from error


def _text(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        text = file.read(BYTES)
    odd = len(NO_TEXT.findall(text)) / max(1, len(text))
    if odd > MOST:
        raise CalibrationError(
            f"{path} is no text in UTF-8: {odd:.0%} of its characters are control characters or "
            "bytes that UTF-8 has not · help: convert it (iconv -t UTF-8, pdftotext), or give a "
            "text, jsonl or parquet file"
        )
    return text


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path)
        if "text" not in table.schema.names:
            raise CalibrationError(
                f"{path} has no column `text` but {', '.join(table.schema.names)} · help: rename "
                "the column, or pass package.module:factory"
            )
        for batch in table.iter_batches(columns=["text"]):
            yield from (str(row) for row in batch.column(0).to_pylist() if row)
    except pyarrow.ArrowInvalid as error:
        raise CalibrationError(f"{path} is not parquet: {error} · help: fetch it again") from error


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CalibrationError(
                    f"{path}:{number} is not JSON: {error} · help: one object a line, "
                    '{"text": "..."}'
                ) from error
            if not isinstance(row, dict) or "text" not in row:
                raise CalibrationError(
                    f"{path}:{number} has no key `text` · help: one object a line, "
                    '{"text": "..."}'
                )
            yield str(row["text"])


def _hub(source: str, evaluation: bool) -> Iterator[str]:
    offline_without_network()
    import datasets  # reads at import whether there is a network

    corpus = CORPORA.get(source) or Corpus(source, {}, "train", "test")
    split = corpus.evaluation if evaluation else corpus.calibration
    try:
        rows = datasets.load_dataset(corpus.path, split=split, streaming=True, **corpus.options)
        for row in rows:
            if row.get(corpus.column):
                yield str(row[corpus.column])
    except (OSError, ValueError, RuntimeError) as error:
        known = ", ".join(CORPORA)
        raise CalibrationError(
            f"{source} is no file or folder here, and the hub gave no data set: "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} · help: without a "
            f"network pass a local .txt, .jsonl or .parquet file, a folder of them, or "
            f"package.module:factory; with one: {known} or owner/name"
        ) from error


def factory(text: str) -> Any:
    """The object that package.module:name names; the working folder counts."""
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module, which may fail in any way
        raise FaspGraphError(
            f"cannot import {text}: {type(error).__name__}: {error} · help: package.module:name, "
            "importable from the working folder or installed"
        ) from error


def made(text: str) -> Any:
    """What the function that package.module:name names returns; an iterator as a list."""
    build = factory(text)
    try:
        found = build()
        return list(found) if isinstance(found, Iterator) else found
    except Exception as error:  # the user's code, which may fail in any way
        raise CalibrationError(
            f"{text}() failed: {type(error).__name__}: {error} · help: mend the function that "
            "--calibration, --evaluation or --data names; --debug shows where"
        ) from error


def is_factory(text: str) -> bool:
    """Whether a text has the form package.module:name."""
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(p.isidentifier() for p in module.split("."))


def image_files(source: str) -> list[Path]:
    """The images in a folder, sorted by name; empty where `source` is no folder of images."""
    path = Path(source)
    if not path.is_dir():
        return []
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES)


def image_batches(
    files: list[Path], shape: tuple[int, int, int], mean: Any, std: Any, batch: int = 8
) -> list[Tensor]:
    """Images as batches [<= batch, C, H, W]: resized to `shape`, scaled to 0..1, normalised."""
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("images need Pillow · help: pip install pillow") from error
    channels, height, width = shape
    rows = []
    for file in files:
        try:
            with Image.open(file) as image:
                small = image.convert("L" if channels == 1 else "RGB").resize((width, height))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise CalibrationError(
                f"{file} is no image that can be read: {error} · help: replace it, or take it out "
                "of the folder that --calibration or --data names"
            ) from error
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        rows.append(pixels.view(height, width, -1).movedim(-1, 0).float() / 255)
    middle, spread = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    return list(((torch.stack(rows) - middle) / spread).split(batch))
