"""The Hugging Face cache on disk, as ``huggingface_hub`` 2.x lays it out, and moei's partial files in it.

    <cache>/models--owner--name/refs/main                  the commit that a branch or tag pointed at
    <cache>/models--owner--name/snapshots/<commit>/<file>  link to the blob
    <cache>/models--owner--name/blobs/<etag>               the bytes; etag is sha256 (LFS) or git-sha1
    <cache>/models--owner--name/blobs/<etag>.moei.incomplete   moei's partial file, resumed by byte range
    <cache>/.locks/models--owner--name/<etag>.lock         one writer for each blob

Names that come from a server (file names, commits, etags) are checked before they become paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moei_core.errors import DamagedFileError, MoeiError
from moei_core.store.gguf_table import gguf_files, is_gguf_folder

# hf's own tools list files that end so as incomplete downloads, so a person can find ours with them too.
PARTIAL_SUFFIX = ".moei.incomplete"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DEFAULT_REVISION = "main"
# What transformers 5.23 reads beside config and weights to make a tokenizer and its chat template.
COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_commit(text: str) -> bool:
    """Whether ``text`` is a full commit hash."""
    return _COMMIT.fullmatch(text) is not None


def is_checksum(etag: str) -> bool:
    """Whether ``etag`` is a git-sha1 or a sha256, which the hub uses as etags."""
    return _ETAG.fullmatch(etag) is not None


def is_repo_id(text: str) -> bool:
    """Whether ``text`` has the form ``owner/name`` of the hub."""
    return _REPO_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def is_safe_name(name: str) -> bool:
    """Whether a file name of a repository stays inside its folder."""
    path = PurePosixPath(name)
    unsafe = not name or path.is_absolute() or "\\" in name or "\0" in name
    return not unsafe and not any(part in ("", ".", "..") for part in name.split("/"))


def default_cache_dir() -> Path:
    """The cache that ``HF_HOME`` and ``HF_HUB_CACHE`` name."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


@dataclass(frozen=True, slots=True)
class RepoCache:
    """The part of the cache that belongs to one model repository."""

    cache_dir: Path
    repo: str

    @property
    def folder(self) -> Path:
        return self.cache_dir / ("models--" + self.repo.replace("/", "--"))

    def blob(self, etag: str) -> Path:
        return self.folder / "blobs" / etag

    def partial(self, etag: str) -> Path:
        return self.folder / "blobs" / (etag + PARTIAL_SUFFIX)

    def lock(self, etag: str) -> Path:
        return self.cache_dir / ".locks" / self.folder.name / f"{etag}.lock"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def ref(self, revision: str) -> Path:
        return self.folder / "refs" / revision

    def refs(self) -> dict[str, str]:
        """Branches and tags that the cache knows, with the commit of each."""
        root = self.folder / "refs"
        found = {}
        for path in sorted(root.rglob("*")) if root.is_dir() else ():
            if path.is_file() and not path.is_symlink() and path.suffix != ".tmp":
                text = path.read_text(encoding="utf-8", errors="replace").strip()
                if is_commit(text):
                    found[path.relative_to(root).as_posix()] = text
        return found

    def commits(self) -> list[str]:
        """The snapshots that exist, complete or not."""
        root = self.folder / "snapshots"
        return sorted(path.name for path in root.iterdir() if is_commit(path.name)) if root.is_dir() else []

    def commit_of(self, revision: str | None) -> str | None:
        """The commit that ``revision`` means in the cache; without one, ``main`` or the only snapshot."""
        wanted = revision or DEFAULT_REVISION
        commits = self.commits()
        if wanted in commits:
            return wanted
        if (commit := self.refs().get(wanted)) is not None:
            return commit
        return commits[0] if revision is None and len(commits) == 1 else None

    def partials(self) -> dict[str, Path]:
        """moei's partial files by etag."""
        root = self.folder / "blobs"
        paths = sorted(root.glob("*" + PARTIAL_SUFFIX)) if root.is_dir() else []
        return {path.name.removesuffix(PARTIAL_SUFFIX): path for path in paths}


def cached_repos(cache_dir: Path) -> Iterator[RepoCache]:
    """Every model repository in the cache."""
    for path in sorted(cache_dir.glob("models--*--*")) if cache_dir.is_dir() else ():
        repo = path.name.removeprefix("models--").replace("--", "/", 1)
        if path.is_dir() and not path.is_symlink() and is_repo_id(repo):
            yield RepoCache(cache_dir, repo)


def read_weight_map(index: Path | bytes) -> dict[str, str]:
    """Tensor name -> file name of a ``model.safetensors.index.json``.

    Raises: DamagedFileError, also when a file name leads out of the model's folder.
    """
    where = str(index) if isinstance(index, Path) else INDEX_NAME
    try:
        content = json.loads(index.read_bytes() if isinstance(index, Path) else index)
        weight_map: dict[str, str] = content["weight_map"]
        fine = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{where} is not an index of safetensors files.", f"{error}.") from error
    if not fine or not weight_map:
        raise DamagedFileError(f"{where} is not an index of safetensors files.", "It has no weight map.")
    for name in set(weight_map.values()):
        if not is_safe_name(name) or not name.endswith(".safetensors"):
            raise DamagedFileError(f"{where} names a file that cannot be one of the model's: {name!r}.")
    return weight_map


def weight_files(folder: Path) -> list[str]:
    """The safetensors files that make up the model in ``folder``: the index's, or the single one; or the GGUF files.

    They are named whether they are there or not. Raises: MoeiError if the folder holds none of these.
    """
    if is_gguf_folder(folder):
        return gguf_files(folder)
    index = folder / INDEX_NAME
    if index.is_file():
        return sorted(set(read_weight_map(index).values()))
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    raise MoeiError(
        f"{folder} has no safetensors weights.",
        f"Neither {INDEX_NAME} nor {SINGLE_NAME} is there.",
        "moei reads safetensors checkpoints only.",
    )


def weights_folder(folder: Path) -> Path:
    """Where the weights of the model in ``folder`` really are: a GGUF file may be on another disk."""
    with suppress(MoeiError):
        return (folder / weight_files(folder)[0]).resolve().parent
    return folder


def missing_files(folder: Path) -> list[str]:
    """What the model in ``folder`` lacks to be loaded, by name; empty if it is complete."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    try:
        names = weight_files(folder)
    except DamagedFileError:
        return [*missing, INDEX_NAME]
    except MoeiError:
        return [*missing, SINGLE_NAME]
    return missing + [name for name in names if not (folder / name).is_file()]
