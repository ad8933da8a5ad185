"""Whether the model hub can be reached; its libraries would try for half a minute."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.utils import get_session

TIMEOUT = 5  # seconds


def offline_without_network() -> None:
    """One short try; where it fails, the hub's libraries read their caches and ask no more."""
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # no route, no name, no proxy: each has its own class
        constants.HF_HUB_OFFLINE = True
