"""``--predictor`` and ``--prefetch``, which mean the same wherever they are given."""

from __future__ import annotations

from moei_cli.choices import one_of
from moei_core.errors import UsageError
from moei_core.predict import DEFAULT_PREDICTOR, PREDICTORS
from moei_core.prefetch import PrefetchMode


def parse_predictor(text: str | None, option: str = "--predictor", *, live: bool = False) -> str | None:
    """``none`` (or nothing), ``default`` or a predictor's name. Raises: UsageError.

    live: for a model, where a file of ``moei trace train`` stands for its stride predictor. In a replay its
    hints are those that the trace has recorded.
    """
    if text is None or text == "none":
        return None
    if live and (text.endswith(".safetensors") or text == "stride"):
        if text == "stride":
            raise UsageError(
                f"{option} stride must be trained for the model first.",
                hint="See moei trace train --help, then give its file: --predictor FILE.safetensors",
            )
        return text
    if text == "default":
        return DEFAULT_PREDICTOR
    return one_of(text, {name: name for name in PREDICTORS}, option)


def parse_prefetch(text: str, option: str = "--prefetch") -> PrefetchMode:
    """``off``, ``on`` or ``auto``. Raises: UsageError."""
    return one_of(text, {mode.name.lower(): mode for mode in PrefetchMode}, option)


def prefetching(
    predictor: str | None, prefetch: str, *, live: bool = False
) -> tuple[str | None, PrefetchMode]:
    """(the predictor, the mode) of both texts. Raises: UsageError, also where there is nothing to prefetch by."""
    name, mode = parse_predictor(predictor, live=live), parse_prefetch(prefetch)
    if name is None and mode is PrefetchMode.ON:
        raise UsageError(
            "--prefetch on has nothing to prefetch by.", hint="Name a predictor: --predictor default"
        )
    return name, mode
