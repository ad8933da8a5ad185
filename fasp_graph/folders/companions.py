"""companions: tokenizer and processor files beside the weights that a model was loaded from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

NAMES = (  # what transformers' tokenizers, image and feature processors read besides config.json
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
    *("merges.txt", "normalizer.json", "chat_template.json", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)


def copy_companions(origin: Any, folder: Path) -> None:
    """Copy what lies in the local folder `origin`, if it is one, and `folder` lacks.

    A folder that holds a tokenizer already gets no second one of another form.
    """
    if not isinstance(origin, str) or not origin or not Path(origin).is_dir():
        return
    source = Path(origin)
    own = (folder / "tokenizer_config.json").is_file()
    for name in NAMES:
        of_tokenizer = "processor" not in name
        if (
            (source / name).is_file()
            and not (folder / name).exists()
            and not (own and of_tokenizer)
        ):
            shutil.copyfile(source / name, folder / name)
