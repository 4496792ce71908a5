"""Packing a model from the command line: shared by ``quantize``, ``pull --quant`` and ``bench --quant``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moei_core.errors import UsageError
from moei_core.hub.packed import FoundStore, companion_files, is_current, place_of, prefer
from moei_core.hub.resolve import ModelFiles, packed_source

if TYPE_CHECKING:
    from moei_cli.render import PullBar


def pack_model(files: ModelFiles, form: str, bar: PullBar, revision: str | None = None) -> Path:
    """Pack ``files`` to ``form`` (``q4_0``) unless that was done, make it what the plain name means; its folder.

    revision: as a person gave it. Raises: what reading the model and writing the store raise; Exit(130).
    """
    if files.format:
        raise UsageError(
            f"{files.name} is packed already.", hint="Give the model itself: packing twice loses twice."
        )
    if files.source == "gguf":
        raise UsageError(
            f"{files.name} is quantised already.", hint=f"It runs as it is: moei chat {files.name}"
        )
    source = packed_source(files, revision)
    place = place_of(source.kind, source.name, source.commit)
    target = place / form
    store = FoundStore(target, form)
    if store.is_complete and is_current(store, files.folder):
        bar.note(f"{files.name} is packed as {form} already.")
    else:
        # Only now: what is done already needs no torch.
        from moei_core.adapters.transformers_adapter import TransformersAdapter
        from moei_core.store.packing import pack, plan_packing

        adapter = TransformersAdapter(files.folder)
        plan = plan_packing(
            adapter.pack_source(source), form.upper(), companions=companion_files(files.folder)
        )
        bar.start(plan.source_nbytes, 0)
        try:
            pack(plan, target, bar.advance)
        except KeyboardInterrupt:
            bar.note("Interrupted. What is packed is kept; the same command goes on from there.")
            raise typer.Exit(130) from None
    prefer(place, form)
    return target


def drop_source(text: str, bar: PullBar) -> int:
    """Delete what moei itself downloaded or made of the model ``text``, but not its stores. Returns bytes freed."""
    from moei_core.config import format_size
    from moei_core.hub.removal import plan_removal, remove

    removal = plan_removal(text, stores=False)
    bar.note(f"Dropping the source: {len(removal.own)} files that moei brought.")
    for path, why in removal.kept:
        bar.note(f"Keeping {path}: {why}.")
    if removal.foreign:
        nbytes = format_size(removal.nbytes(removal.foreign))
        bar.note(f"{len(removal.foreign)} files ({nbytes}) of it came from another program and stay.")
    return remove(removal) if removal.own else 0
