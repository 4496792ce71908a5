"""A local hub, an empty cache and an empty home for each test."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants

from moei_cli.main import main
from moei_core.hub import remote
from moei_core.hub.pull import plan_pull, pull
from moei_core.hub.remote import Remote
from moei_core.hub.transfer import SilentProgress
from tests.hub.checkpoints import mixtral
from tests.hub.local_hub import LocalHub

REPO = "tiny/mixtral"


class Recorder(SilentProgress):
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.total = self.present = 0
        self.notes: list[str] = []
        self._lock = threading.Lock()

    def start(self, total: int, present: int) -> None:
        self.total, self.present = total, present

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self.present += nbytes

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass
class Place:
    """Where one test's files are, and short ways to pull."""

    hub: LocalHub
    root: Path
    cache: Path
    home: Path

    def remote(self, repo: str = REPO) -> Remote:
        self.notes: list[str] = []
        return Remote(repo, endpoint=self.hub.url, first_wait=0.01, note=self.notes.append)

    def pull(self, repo: str = REPO, revision: str | None = None, **options: object) -> Path:
        hub = self.remote(repo)
        plan = plan_pull(repo, revision, cache_dir=self.cache, remote=hub)
        self.progress = Recorder()
        folder = pull(plan, self.progress, remote=hub, **options)  # type: ignore[arg-type]
        # However the bytes came, all of them were counted once.
        assert self.progress.present == self.progress.total
        return folder

    def repo_folder(self, repo: str = REPO) -> Path:
        return self.cache / ("models--" + repo.replace("/", "--"))

    @property
    def environment(self) -> dict[str, str]:
        """For child processes."""
        return {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("HF_", "MOEI_", "TRANSFORMERS_"))
            },
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.cache.parent),
            "MOEI_HOME": str(self.home),
            "NO_COLOR": "1",
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command line in this process: its exit code and what it printed."""
        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(remote, "Remote", functools.partial(Remote, endpoint=self.hub.url, first_wait=0.01))
            patch.setattr(sys, "stdin", io.StringIO())
            code = 0
            try:
                main(list(arguments))
            except SystemExit as exit:
                code = int(exit.code or 0)
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """The command line in a child process."""
        return subprocess.Popen(
            [sys.executable, "-c", "from moei_cli.main import main; main()", *arguments],
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    cache, home = tmp_path / "hf" / "hub", tmp_path / "home"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOEI_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with LocalHub() as hub:
        yield Place(hub, tmp_path, cache, home)


@pytest.fixture
def tiny(place: Place) -> dict[str, bytes]:
    """A small sharded Mixtral on the hub; its files."""
    files = mixtral()
    place.hub.add(REPO, files)
    return files
