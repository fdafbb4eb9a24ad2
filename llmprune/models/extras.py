"""The files that go with a model's weights, whatever becomes of those."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmprune.base.errors import denied

_EXTRAS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def copy_extras(source: Path, folder: Path) -> None:
    """Copy configuration, tokenizer and licence files.

    Raises:
        InputError: one cannot be read, or the output cannot be written.
    """
    for path in (path for pattern in _EXTRAS for path in sorted(source.glob(pattern)) if path.is_file()):
        try:
            to = folder / path.relative_to(source)
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, to)
        except OSError as error:
            raise denied(error, f"cannot copy {path} beside the output folder: {error.strerror}") from None
