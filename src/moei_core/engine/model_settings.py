"""What a model's folder and some options say: the float type, the tokenizer, how replies are made and end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from moei_core.config import GenerationSettings
from moei_core.errors import DamagedFileError, UsageError


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
            f"The tokenizer in {folder} cannot be loaded.",
            first,
            "Remove the model and pull it again: a pull alone keeps a file that has its size.",
        ) from error


def recommended_settings(folder: Path) -> GenerationSettings:
    """What the model's authors recommend in ``generation_config.json``, else ours. Raises: DamagedFileError."""
    given = _generation_config(folder)
    fields: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        value = given.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            fields[name] = int(value) if name == "top_k" and float(value).is_integer() else value
    if given.get("do_sample") is False:
        fields["temperature"] = 0.0
    try:
        return GenerationSettings(**fields)
    except UsageError as error:
        raise _damaged(folder, error.what) from None


def end_tokens(folder: Path, named: Iterable[object]) -> frozenset[int]:
    """The token ids that end a reply: what ``generation_config.json`` and others have ``named``, each one or a list.
    Raises: DamagedFileError."""
    found = [_generation_config(folder).get("eos_token_id"), *named]
    flat = [entry for value in found for entry in (value if isinstance(value, list) else [value])]
    return frozenset(entry for entry in flat if isinstance(entry, int))


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _damaged(folder, "It is not valid JSON.") from None
    if not isinstance(given, dict):
        raise _damaged(folder, "It is no JSON object.")
    return given


def _damaged(folder: Path, why: str) -> DamagedFileError:
    return DamagedFileError(
        f"{folder / 'generation_config.json'} is damaged.",
        why,
        "Remove the model and pull it again: a pull alone keeps a file that has its size.",
    )
