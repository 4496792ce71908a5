"""Talking to the hub through ``huggingface_hub``: its session, tokens, proxies and endpoint; our patience.

``HfApi`` does not retry, and a stream that breaks must be resumed rather than repeated, so the back-off is
here, once, for both. Every failure leaves as an error of moei's tree.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import HfFileMetadata, get_hf_file_metadata, hf_hub_url
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    logging,
    parse_ratelimit_headers,
)

from moei_core import __version__
from moei_core.errors import ModelNotFoundError, MoeiError, OfflineError

# The library's warnings about retries would be printed between the lines of our progress.
logging.set_verbosity(logging.ERROR)

T = TypeVar("T")

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_ATTEMPTS = 6
# Without any network a person should not wait through the whole back-off to be told so.
_CONNECT_ATTEMPTS = 3
_LONGEST_WAIT = 300.0


class Stopped(Exception):
    """Another part of the pull failed or the person pressed Ctrl-C: give up quietly."""


class Remote:
    """One repository on the hub.

    first_wait: seconds before the first repetition; doubled each time, up to 30.
    stop: set to make waits and streams end soon, with ``Stopped``.
    note: called with a sentence when a wait is worth telling a person.
    """

    def __init__(
        self,
        repo: str,
        *,
        endpoint: str | None = None,
        first_wait: float = 1.0,
        stop: threading.Event | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.repo = repo
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.stop = stop or threading.Event()
        self._first_wait = first_wait
        self._note = note or (lambda text: None)
        self._api = HfApi(endpoint=self.endpoint, library_name="moei", library_version=__version__)

    def model_info(self, revision: str) -> ModelInfo:
        """What the repository holds at ``revision``, with sizes and checksums."""
        return self.retrying(
            lambda: self._api.model_info(
                self.repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ),
            revision,
        )

    def file_metadata(self, commit: str, name: str) -> HfFileMetadata:
        """Etag and size of one file."""
        url = self._url(commit, name)
        return self.retrying(lambda: get_hf_file_metadata(url, endpoint=self.endpoint), commit)

    def read(self, commit: str, name: str) -> bytes:
        """A small file, whole."""

        def read() -> bytes:
            with self.stream(commit, name, 0) as response:
                return response.read()

        return self.retrying(read, commit)

    @contextmanager
    def stream(self, commit: str, name: str, offset: int) -> Iterator[httpx2.Response]:
        """The bytes of a file from ``offset`` on, if the server knows ranges; the caller checks the answer.

        Raises what httpx2 and huggingface_hub raise: the caller resumes, see ``wait_or_raise``.
        """
        # httpx2 drops the token by itself when the hub redirects to another host.
        headers = build_hf_headers(library_name="moei", library_version=__version__)
        headers["Accept-Encoding"] = "identity"
        headers[constants.X_HF_DOWNLOAD_COUNTER] = "1"
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with get_session().stream(
            "GET", self._url(commit, name), headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            hf_raise_for_status(response)
            yield response

    def retrying(self, call: Callable[[], T], revision: str = "") -> T:
        """``call()``, again after transient failures. Raises: MoeiError, Stopped."""
        attempt = 0
        while True:
            try:
                return call()
            except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
                attempt += 1
                self.wait_or_raise(error, attempt, revision)

    def wait_or_raise(self, error: Exception, attempt: int, revision: str = "") -> None:
        """After the ``attempt``-th failure in a row: sleep as long as is right, or raise a MoeiError."""
        wait = None
        if isinstance(error, HfHubHTTPError):
            if error.response.status_code in _TRANSIENT and attempt < _ATTEMPTS:
                wait = _asked_wait(error.response)
        elif isinstance(error, httpx2.ConnectError):
            wait = 0.0 if attempt < _CONNECT_ATTEMPTS else None
        elif isinstance(error, httpx2.TransportError):
            wait = 0.0 if attempt < _ATTEMPTS else None
        if wait is None or wait > _LONGEST_WAIT:
            raise explain(error, self.repo, revision, self.endpoint) from error
        if not wait:
            # A little disorder, so that many downloads do not return at the same moment.
            wait = min(self._first_wait * 2 ** (attempt - 1), 30.0) * random.uniform(0.8, 1.2)
        if wait >= 1.5:
            self._note(f"The hub is busy or unreachable; trying again in {wait:.0f} s.")
        if self.stop.wait(wait):
            raise Stopped

    def _url(self, commit: str, name: str) -> str:
        return hf_hub_url(self.repo, name, revision=commit, endpoint=self.endpoint)


def _asked_wait(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait (rate limit or ``Retry-After``), 0 if it does not say."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds) + 1
    asked = response.headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return 0.0


def explain(error: Exception, repo: str, revision: str, endpoint: str) -> MoeiError:
    """The error of moei's tree for what the hub or the network said about ``repo``."""
    page = f"{endpoint}/{repo}"
    has_token = get_token() is not None
    log_in = "run `hf auth login` or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return OfflineError(
            f"{repo} is not completely on this machine and offline mode is on.",
            "HF_HUB_OFFLINE is set.",
            f"Unset HF_HUB_OFFLINE and run: moei pull {repo}",
        )
    if isinstance(error, GatedRepoError):
        return ModelNotFoundError(
            f"{repo} is gated: its authors want you to accept their terms first.",
            "Your token has not been granted access." if has_token else "No token was found.",
            f"Accept the terms at {page}" + ("" if has_token else f", {log_in}") + ", then pull again.",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFoundError(
            f"{repo} has no revision '{revision}'.", hint=f"See {page}/tree/main for branches and tags."
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFoundError(
            f"{repo} does not exist on {endpoint}, or it is private.",
            "" if has_token else "No token was found.",
            "Check the spelling" + ("." if has_token else f"; for a private model, {log_in}."),
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return ModelNotFoundError(f"A file of {repo} has vanished from the hub.", hint="Pull again.")
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, repo, page, endpoint)
    reached = not isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
    return OfflineError(
        f"The connection to {endpoint} keeps breaking." if reached else f"{endpoint} cannot be reached.",
        f"{type(error).__name__}: {' '.join(str(error).split()) or 'no answer'}.",
        "Check the network (HF_ENDPOINT names another hub) and pull again: what has arrived is kept.",
    )


def _explain_status(error: HfHubHTTPError, repo: str, page: str, endpoint: str) -> MoeiError:
    status = error.response.status_code
    said = f"The server said {status}: {error.server_message or error.response.reason_phrase or 'nothing'}."
    if status in (401, 403):
        return ModelNotFoundError(
            f"{endpoint} refused access to {repo}.",
            said,
            f"Check your token (`hf auth whoami`, HF_TOKEN) and its permissions, and {page}.",
        )
    if status == 404:
        return ModelNotFoundError(f"{repo} was not found on {endpoint}.", said, "Check the spelling.")
    return MoeiError(
        f"{endpoint} failed while serving {repo}.", said, "Pull again later: what has arrived is kept."
    )
