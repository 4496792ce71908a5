"""What some options mean for a model: the float type, the length of a conversation, its tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from moei_core.errors import DamagedFileError, UsageError

DEFAULT_CONTEXT = 4096


def float_type(name: str | None) -> torch.dtype | None:
    """The dtype of ``--dtype``; None: the checkpoint's own. Raises: UsageError."""
    if name is None:
        return None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UsageError(
            f"'{name}' is not a dtype moei computes in.", hint=f"Choose from: {', '.join(known)}."
        )
    return known[name]


def context_length(config: Any, asked: int | None) -> int:
    """Tokens of one conversation. config: of the text model. Raises: UsageError."""
    longest = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    if asked is None:
        return int(min(longest, DEFAULT_CONTEXT))
    if not 16 <= asked <= longest:
        raise UsageError(
            f"--context {asked} is out of range.",
            f"This model was made for 16 to {longest} tokens of context.",
        )
    return asked


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises: DamagedFileError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # Without its files transformers makes some tokenizers all the same, for which every text is empty.
        if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab():
            raise ValueError("It has no words: its files, such as tokenizer.json, are missing.")
        # A chat says itself when a conversation is too long; transformers would print a warning of its own.
        tokenizer.model_max_length = sys.maxsize
        return tokenizer
    except Exception as error:
        # Whatever transformers raises here: the folder has no usable tokenizer.
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFileError(
            f"The tokenizer in {folder} cannot be loaded.", first, "Pull the model again."
        ) from error
