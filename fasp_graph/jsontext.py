"""JSON text that any reader takes, and JSON from files that nobody vouches for.

Numbers that are not finite become null, tuples lists, values of other types text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from passes.errors import FaspGraphError

LARGEST = 1 << 28  # bytes of a file: every kept unit of a 400B model, several times
_DAMAGED = "help: the file is damaged or another's; fetch its folder again"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that nobody vouches for; FaspGraphError if there is none."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise FaspGraphError(
                f"{path} has {size:,} bytes; at most {LARGEST:,} are read · {_DAMAGED}"
            )
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FaspGraphError(f"{path} is not JSON: {str(error)[:200]} · {_DAMAGED}") from error
    except OSError as error:
        raise FaspGraphError(
            f"cannot read {path}: {error.strerror or error} · {_DAMAGED}"
        ) from error
    if not isinstance(found, dict):
        raise FaspGraphError(
            f"{path} holds a JSON {type(found).__name__}, not an object · {_DAMAGED}"
        )
    return found


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON of `value`."""
    return json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """`value` in the types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(held) for held in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return str(value)
