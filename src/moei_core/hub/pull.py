"""``moei pull``: decide what is needed, check the disk, bring the files, then say that the snapshot is there.

The order makes every moment a safe one to die: record of the plan, blobs (each verified before it gets its
name), links of the snapshot, and last the branch's name, by which other tools find the snapshot.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import Timeout
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import WeakFileLock

from moei_core.errors import (
    DamagedFileError,
    MoeiError,
    OfflineError,
    UnsupportedModelError,
)
from moei_core.hub import registry
from moei_core.hub.layout import (
    COMPANION_FILES,
    DEFAULT_REVISION,
    INDEX_NAME,
    SINGLE_NAME,
    RepoCache,
    default_cache_dir,
    is_checksum,
    is_commit,
    is_safe_name,
    missing_files,
    read_weight_map,
)
from moei_core.hub.packed import packed_commit, repo_place
from moei_core.hub.pull_plan import PullPlan, check_space, free_space
from moei_core.hub.remote import Remote, Stopped
from moei_core.hub.runnable import quant_method, why_not, why_not_packed
from moei_core.hub.summary import expert_count
from moei_core.hub.transfer import (
    PlannedFile,
    PullProgress,
    SilentProgress,
    Transfer,
    blob_is_here,
    damaged_twice,
    disk_errors,
    is_copy,
    nbytes_here,
    new_checksum,
)
from moei_core.store.packed_folder import is_packed

# As many as huggingface_hub uses: one connection to a CDN seldom fills a fast line.
_CONNECTIONS = 8
_LEFTOVER_AGE_S = 24 * 3600


def plan_pull(
    repo: str,
    revision: str | None = None,
    *,
    cache_dir: Path | None = None,
    remote: Remote | None = None,
    packed_as: str | None = None,
) -> PullPlan:
    """Ask the hub what ``repo`` holds and choose the files that a chat needs. Writes nothing.

    packed_as: the model is wanted in this format; packed so already, it needs no files. Without network the cache is
    asked instead. Raises: OfflineError if it is not complete there,
    ModelNotFoundError, UnsupportedModelError, MoeiError.
    """
    cache = RepoCache((cache_dir or default_cache_dir()).absolute(), repo)
    wanted = revision or DEFAULT_REVISION
    remote = remote or Remote(repo)
    if not is_safe_name(wanted):
        raise MoeiError(f"'{wanted}' cannot be the name of a revision.", hint="Give a branch, tag or commit.")
    try:
        info = remote.model_info(wanted)
    except OfflineError as error:
        here = packed_commit(repo, revision) if packed_as else None
        if here is not None and packed_as is not None and is_packed(repo_place(repo) / here / packed_as):
            return _nothing_to_do(cache, wanted, here, packed_as, online=False)
        return replace(_plan_offline(cache, wanted, error), packed_as=packed_as or "")
    commit = info.sha or ""
    if not is_commit(commit):
        raise MoeiError(
            f"{remote.endpoint} does not behave like a Hugging Face hub.",
            "It names no commit.",
            "Check HF_ENDPOINT.",
        )
    if packed_as is not None and is_packed(repo_place(repo) / commit / packed_as):
        return _nothing_to_do(cache, wanted, commit, packed_as, online=True)
    files = _choose(repo, info, commit, remote)
    config = _config(next(file.content for file in files if file.name == "config.json") or b"")
    if (reason := why_not(config)) is not None:
        raise UnsupportedModelError(f"moei cannot run {repo}, so it is not downloaded.", *reason)
    if packed_as is not None and (reason := why_not_packed(config, packed_as)) is not None:
        raise UnsupportedModelError(
            f"{repo} cannot be packed as {packed_as}, so it is not downloaded.", *reason
        )
    card = vars(info.card_data) if info.card_data is not None else {}
    return PullPlan(
        cache=cache,
        revision=wanted,
        commit=commit,
        files=files,
        present_nbytes=_nbytes_present(cache, commit, files),
        free_nbytes=free_space(cache.cache_dir),
        licence=_licence(card, info.tags or ()),
        gated=bool(info.gated),
        is_moe=expert_count(config) > 1,
        packed_as=packed_as or "",
        quant_method=quant_method(config),
    )


def _nothing_to_do(cache: RepoCache, revision: str, commit: str, packed_as: str, online: bool) -> PullPlan:
    free = free_space(cache.cache_dir)
    return PullPlan(cache, revision, commit, (), 0, free, online=online, packed_as=packed_as, is_packed=True)


def _plan_offline(cache: RepoCache, revision: str, error: OfflineError) -> PullPlan:
    commit = cache.commit_of(revision)
    missing = ["everything"] if commit is None else missing_files(cache.snapshot(commit))
    if commit is None or missing:
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise OfflineError(
            f"{cache.repo} is not completely on this machine (missing: {named}).",
            f"{error.what} {error.why}",
            f"When the network is there again, run: moei pull {cache.repo}",
        ) from error
    return PullPlan(cache, revision, commit, (), 0, free_space(cache.cache_dir), online=False)


def _choose(repo: str, info: ModelInfo, commit: str, remote: Remote) -> tuple[PlannedFile, ...]:
    """The files of the index's weight map, config, tokenizer and chat template; nothing else."""
    there = {file.rfilename: file for file in info.siblings or () if is_safe_name(file.rfilename)}
    if "config.json" not in there:
        gguf = any(name.endswith(".gguf") for name in there)
        raise UnsupportedModelError(
            f"{repo} has no config.json" + (" but GGUF files." if gguf else "."),
            "moei pulls safetensors checkpoints for transformers"
            + (" and no GGUF files yet." if gguf else "."),
            "Download one by other means and name it: moei chat FILE.gguf" if gguf else "",
        )
    names = [name for name in sorted(there) if any(fnmatchcase(name, pattern) for pattern in COMPANION_FILES)]
    read = {"config.json": _read(repo, commit, there["config.json"], remote)}
    if INDEX_NAME in there:
        read[INDEX_NAME] = _read(repo, commit, there[INDEX_NAME], remote)
        names += [INDEX_NAME, *sorted(set(read_weight_map(read[INDEX_NAME]).values()))]
    elif SINGLE_NAME in there:
        names.append(SINGLE_NAME)
    else:
        raise UnsupportedModelError(
            f"{repo} has no safetensors weights.",
            f"Neither {INDEX_NAME} nor {SINGLE_NAME} is there; moei reads no other format.",
            "Look for a conversion of this model to safetensors.",
        )
    absent = [name for name in names if name not in there]
    if absent:
        raise DamagedFileError(
            f"{repo} is incomplete on the hub: its index names {absent[0]}, which is not there.",
            hint="Try another --revision.",
        )
    return tuple(_planned(repo, there[name], read.get(name)) for name in names)


def _read(repo: str, commit: str, file: RepoSibling, remote: Remote) -> bytes:
    """A small file that planning needs, verified. Raises: DamagedFileError if it is wrong twice."""
    planned = _planned(repo, file, None)
    for _ in range(2):
        content = remote.read(commit, file.rfilename)
        checksum = new_checksum(planned.etag, len(content))
        checksum.update(content)
        if checksum.hexdigest() == planned.etag:
            return content
    raise damaged_twice(file.rfilename, repo)


def _config(content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except ValueError as error:
        raise DamagedFileError("The model's config.json is not JSON.", f"{error}.") from error
    return config if isinstance(config, dict) else {}


def _planned(repo: str, file: RepoSibling, content: bytes | None) -> PlannedFile:
    etag = file.lfs.sha256 if file.lfs is not None else file.blob_id
    nbytes = file.lfs.size if file.lfs is not None else file.size
    if etag is None or nbytes is None or not is_checksum(etag):
        raise MoeiError(
            f"The hub gives no checksum for {file.rfilename} of {repo}.",
            "moei does not download what it cannot verify.",
            "Check HF_ENDPOINT.",
        )
    return PlannedFile(file.rfilename, nbytes, etag, content)


def _licence(card: dict[str, object], tags: Iterable[str]) -> str:
    named = card.get("license_name") or card.get("license")
    tagged = (tag.removeprefix("license:") for tag in tags if tag.startswith("license:"))
    return str(named or next(tagged, ""))


def _nbytes_present(cache: RepoCache, commit: str, files: Iterable[PlannedFile]) -> int:
    return sum(
        file.nbytes if is_copy(cache.snapshot(commit) / file.name, file) else nbytes_here(cache, file)
        for file in files
    )


def pull(
    plan: PullPlan,
    progress: PullProgress | None = None,
    *,
    remote: Remote | None = None,
    connections: int = _CONNECTIONS,
) -> Path:
    """Carry ``plan`` out and return the folder of the complete snapshot.

    Raises: DoesNotFitError before the first byte or when the disk fills up, DamagedFileError, OfflineError,
    ModelNotFoundError, MoeiError. What has arrived is kept and resumed by the next pull.
    """
    if not plan.online:
        return plan.folder
    check_space(plan)
    progress = progress or SilentProgress()
    remote = remote or Remote(plan.repo, note=progress.note)
    cache = plan.cache
    progress.start(plan.total_nbytes, plan.present_nbytes)
    if not _all_linked(plan):
        earlier = _etags_in_progress(plan)
        record = registry.PullRecord(
            repo=plan.repo,
            revision=plan.revision,
            commit=plan.commit,
            cache_dir=cache.cache_dir,
            files={file.name: (file.nbytes, file.etag) for file in plan.files},
            licence=plan.licence,
            started=registry.now(),
        )
        registry.write_record(record)
        _bring_all(plan, remote, progress, connections)
        _remove_leftovers(cache, earlier)
    missing = missing_files(plan.folder)
    if missing:
        raise MoeiError(f"{missing[0]} of {plan.repo} was removed during the pull.", hint="Pull again.")
    _write_ref(plan)
    return plan.folder


def _all_linked(plan: PullPlan) -> bool:
    """Whether every file is in its place already, so that nothing needs to be written."""
    return all(
        is_copy(plan.folder / file.name, file)
        or (
            blob_is_here(plan.cache, file) and _points_to(plan.folder / file.name, plan.cache.blob(file.etag))
        )
        for file in plan.files
    )


def _points_to(pointer: Path, blob: Path) -> bool:
    with suppress(OSError):
        return pointer.samefile(blob)
    return False


def _etags_in_progress(plan: PullPlan) -> set[str]:
    """Etags that an earlier pull of this same revision wanted: superseded if the new plan lacks them."""
    return {
        etag
        for record in registry.records(plan.repo, plan.cache.cache_dir)
        if record.revision == plan.revision
        for etag in record.etags
    }


def _bring_all(plan: PullPlan, remote: Remote, progress: PullProgress, connections: int) -> None:
    transfer = Transfer(
        plan.cache, plan.commit, remote, progress, own=lambda etag: registry.own(plan.cache, etag)
    )
    # The small files first: they fail early if access is refused, and the shards then fill all connections.
    files = sorted(plan.files, key=lambda file: file.name.endswith(".safetensors"))
    with ThreadPoolExecutor(max_workers=connections, thread_name_prefix="pull") as pool:
        futures = [pool.submit(transfer.bring, file) for file in files]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # Reached by Ctrl-C too: running transfers end at their next read, waiting ones never start.
            remote.stop.set()
            for future in futures:
                future.cancel()
    errors = [future.exception() for future in futures if not future.cancelled()]
    for error in errors:
        if error is not None and not isinstance(error, Stopped):
            raise error


def _write_ref(plan: PullPlan) -> None:
    if plan.revision == plan.commit:
        return
    path = plan.cache.ref(plan.revision)
    with suppress(OSError):
        if path.read_text(encoding="utf-8") == plan.commit:
            return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{threading.get_native_id()}.tmp")
        new.write_text(plan.commit, encoding="utf-8")
        new.replace(path)


def _remove_leftovers(cache: RepoCache, superseded: set[str]) -> None:
    """Delete partial files that no pull will resume.

    Those are what an earlier pull of this revision wanted and this one no longer does, and what no record
    wants and nobody has touched for a day (a pull by somebody with another MOEI_HOME may still be at work). A
    partial file whose blob lock is held belongs to a living download in any case.
    """
    wanted = {etag for record in registry.records(cache.repo, cache.cache_dir) for etag in record.etags}
    for etag, path in cache.partials().items():
        with suppress(Timeout, OSError):
            dead = etag in superseded or time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S
            if etag not in wanted and dead:
                with WeakFileLock(cache.lock(etag), timeout=0.05):
                    path.unlink(missing_ok=True)
