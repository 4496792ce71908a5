"""Contracts that import-linter cannot express."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
PRIVATE = ("integrations", "core_model_loading", "conversion_mapping", "modeling_utils")


def imported(file: Path) -> set[str]:
    """The modules that a file names in its imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_one_file_knows_transformers_private_parts() -> None:
    private = tuple(f"transformers.{name}" for name in PRIVATE)
    knowing = {f.name for f in SOURCE.rglob("*.py") if any(name.startswith(private) for name in imported(f))}
    assert knowing == {"transformers_private.py"}


def test_every_long_file_says_why() -> None:
    for file in SOURCE.rglob("*.py"):
        text = file.read_text()
        if text.count("\n") > 400:
            assert "400 lines" in (ast.get_docstring(ast.parse(text)) or ""), file


def test_the_brain_runs_without_torch() -> None:
    code = "import sys, moei_core.scheduler, moei_core.cache.policies; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
