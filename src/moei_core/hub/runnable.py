"""Whether a model can run at all, told from its config: before gigabytes are downloaded, and without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moei_core.hub.summary import text_config
from moei_core.quant import READ_QUANTISATIONS


def quant_method(config: Mapping[str, Any]) -> str:
    """How the weights of a checkpoint are quantised, as its ``config.json`` says; empty if they are not."""
    for place in (config, text_config(config)):
        method = place.get("quantization_config")
        if isinstance(method, Mapping) and method:
            return str(method.get("quant_method", "an unknown method"))
    return ""


def why_not(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(why moei cannot run a checkpoint of this ``config.json``, what to do); None: nothing speaks against it."""
    if (method := quant_method(config)) not in READ_QUANTISATIONS:
        return (
            f"Its weights are quantised with {method}, which moei does not read yet.",
            "Use a bf16 version of the model.",
        )
    kind, known = config.get("model_type"), _known_types()
    if isinstance(kind, str) and known and kind not in known:
        return (
            f"Its architecture '{kind}' is not part of transformers {version('transformers')}.",
            "Look for a version of the model made for transformers, without code of its own.",
        )
    return None


def why_not_packed(config: Mapping[str, Any], form: str) -> tuple[str, str] | None:
    """(why a checkpoint of this ``config.json`` cannot be packed as ``form``, what to do); None: nothing speaks
    against it."""
    published = quant_method(config) == "mxfp4"
    if published and form != "mxfp4":
        return (
            "Its experts are stored as MXFP4 already: packing again would lose accuracy and save nothing.",
            "Pull it with --quant mxfp4, which keeps their values, or without --quant.",
        )
    if form == "mxfp4" and not published:
        return (
            "Only experts that were published in MXFP4 are kept so; moei does not round to it.",
            "Choose q8_0 or q4_0.",
        )
    return None


@cache
def _known_types() -> frozenset[str]:
    """The architectures of the installed transformers; empty if its table of them is not where it was.

    Read as text: importing transformers takes seconds, and torch with it.
    """
    found = find_spec("transformers")
    kinds: set[str] = set()
    for folder in found.submodule_search_locations or () if found is not None else ():
        for path in (Path(folder) / "models" / "auto").glob("*.py"):
            kinds.update(
                re.findall(r'"([\w.-]+)"(?:,|:|\] =) *"\w+Config"', path.read_text(encoding="utf-8"))
            )
    return frozenset(kinds if "mixtral" in kinds else ())
