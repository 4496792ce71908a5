"""Packing a model folder in a test."""

from __future__ import annotations

from pathlib import Path

from moei_core.adapters.transformers_adapter import TransformersAdapter
from moei_core.store.packed_manifest import Manifest, PackedSource
from moei_core.store.packing import PackPlan, Progress, pack, plan_packing

SOURCE = PackedSource("folder", "a-model", "", "", {"model.safetensors": "1"})


def plan(folder: Path, form: str = "Q8_0", layout: str = "plain") -> PackPlan:
    companions = [path for path in folder.iterdir() if path.suffix in (".json", ".jinja")]
    companions = [path for path in companions if path.name != "model.safetensors.index.json"]
    return plan_packing(TransformersAdapter(folder).pack_source(SOURCE), form, "", layout, companions)


def pack_folder(
    folder: Path, target: Path, form: str = "Q8_0", layout: str = "plain", progress: Progress = lambda n: None
) -> Manifest:
    return pack(plan(folder, form, layout), target, progress)
