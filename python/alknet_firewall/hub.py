"""Model weights from the Hugging Face Hub. The only code that talks to it.

`huggingface_hub` does the work: its cache, its token, its ``HF_*`` environment variables and the
usual proxy variables all count. It is imported when something is to be fetched and not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .detector import Progress, file_sha256
from .errors import HubError

__all__ = ["HUB_SOURCES", "HubSource", "Snapshot", "download"]

ALLOW_PATTERNS = ["*.safetensors", "*.json"]
# Models lie at the top of their repository; folders below hold exports and training logs.
IGNORE_PATTERNS = ["*/*"]


@dataclass(frozen=True)
class HubSource:
    """A model repository on the Hub.

    Attributes
    ----------
    repo : str
        ``owner/name``.
    license : str
        SPDX identifier of the weights' licence.
    revision : str
        Commit that is fetched unless another is asked for. A branch is resolved once, and the
        commit recorded.
    sha256 : Mapping[str, str]
        Pinned files of that revision.
    """

    repo: str
    license: str
    revision: str = "main"
    sha256: Mapping[str, str] = field(default_factory=dict)


HUB_SOURCES: Mapping[str, HubSource] = {
    "smollm2-135m": HubSource(
        repo="HuggingFaceTB/SmolLM2-135M",
        license="Apache-2.0",
        revision="93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
        sha256={
            "model.safetensors": "80521b40281d6ce74e35c9282c22539e75aa0ac8578892b2a59955ef78d55da1",
        },
    ),
    "smollm2-135m-instruct-hub": HubSource(
        repo="HuggingFaceTB/SmolLM2-135M-Instruct", license="Apache-2.0"
    ),
}
"""Detectors that are made from the Hub, by name."""


@dataclass(frozen=True)
class Snapshot:
    """A downloaded repository: its folder, and the commit it was resolved to."""

    folder: Path
    revision: str


def download(
    source: HubSource,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Snapshot:
    """Fetch a model's safetensors and JSON files and check those that are pinned.

    Parameters
    ----------
    source : HubSource
        Which model.
    revision : str, optional
        Commit, tag or branch, by default the source's own. Pinned hashes hold for that one only.
    token : str or bool, optional
        Access token; by default ``HF_TOKEN`` or what ``hf auth login`` stored.
    cache_dir : Path, optional
        By default the Hub's own cache (``HF_HOME``), so that nothing is fetched twice.
    offline : bool
        Use the cache or fail; ``HF_HUB_OFFLINE=1`` does the same.
    progress : Progress, optional
        Called with bytes, from several threads.

    Raises
    ------
    HubError
        With what went wrong and what to do about it.
    """
    wanted = revision or source.revision
    client = _Client(source.repo, wanted, token, cache_dir, offline, progress)
    snapshot = client.snapshot()
    if snapshot.revision == source.revision:
        for file, sha256 in source.sha256.items():
            _check_pinned(client, snapshot, file, sha256, progress)
    return snapshot


def _check_pinned(
    client: _Client, snapshot: Snapshot, file: str, sha256: str, progress: Progress | None
) -> None:
    path = snapshot.folder / file
    if not path.is_file():
        raise HubError(f"{client.where} has no {file}; is this the repository you meant?")
    if file_sha256(path, progress) == sha256:
        return
    # The cache may hold a damaged copy, which the client would hand out for ever.
    client.fetch_again(file)
    found = file_sha256(path, progress)
    if found != sha256:
        raise HubError(
            f"{file} of {client.where} has sha256 {found}, expected {sha256}: it is not the file "
            "that was pinned; check the mirror or proxy that it came through"
        )


@dataclass(frozen=True)
class _Client:
    """`huggingface_hub` for one repository and revision, with its errors translated."""

    repo: str
    revision: str
    token: str | bool | None
    cache_dir: Path | None
    offline: bool
    progress: Progress | None

    @property
    def where(self) -> str:
        return f"{self.repo} at {self.revision}"

    def snapshot(self) -> Snapshot:
        from huggingface_hub import snapshot_download

        folder = self._call(
            snapshot_download,
            allow_patterns=ALLOW_PATTERNS,
            ignore_patterns=IGNORE_PATTERNS,
        )
        # The cache's documented layout is .../snapshots/COMMIT: no second request is needed to
        # learn what a branch was resolved to, and none can disagree with what was fetched.
        return Snapshot(folder, folder.name)

    def fetch_again(self, file: str) -> None:
        from huggingface_hub import hf_hub_download

        if not self.offline:
            self._call(hf_hub_download, filename=file, force_download=True)

    def _call(self, function: Any, **options: Any) -> Path:
        try:
            path = function(
                self.repo,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.offline,
                tqdm_class=_progress_bar(self.progress),
                **options,
            )
        # Everything: the client lets errors of its HTTP library through, which is httpx in 1.x and
        # httpx2 in 2.x and not ours to import. Nothing but the client runs in this `try`.
        except Exception as error:
            raise HubError(f"{self.where}: {_advice(error, self.repo)}") from error
        return Path(path)


def _advice(error: Exception, repo: str) -> str:
    """Say what happened and what to do, for an error of the client."""
    from huggingface_hub import errors

    # Narrow ones first: most of these derive from each other, and all of them from OSError.
    match error:
        case errors.GatedRepoError():
            return (
                f"the repository is gated; accept its terms at https://huggingface.co/{repo} "
                "and set HF_TOKEN to a token of that account"
            )
        case errors.RepositoryNotFoundError():
            return (
                "there is no such repository, or it is private; check the name, and set HF_TOKEN "
                "if it is private"
            )
        case errors.RevisionNotFoundError():
            return "there is no such revision in the repository; check the commit, tag or branch"
        case errors.LocalEntryNotFoundError():
            return _advice_not_cached(error)
        case errors.EntryNotFoundError():
            return "the repository lists a file that it does not deliver; try again later"
        case errors.OfflineModeIsEnabled():
            return _OFFLINE
        case errors.HfHubHTTPError():
            return _advice_status(error.response.status_code)
        case errors.HFValidationError():
            return "this is not a repository name; it should be owner/name"
        case OSError() if "Consistency check" in str(error):
            return "the download broke off; run the same command again"
        case _:
            return (
                f"the download failed ({type(error).__name__}: {_first_line(error)}); check the "
                "network and proxy settings and run the same command again"
            )


_OFFLINE = (
    "offline, and the files are not all in the cache; run the same command once with a network "
    "(and without HF_HUB_OFFLINE), or copy the cache or a bundle from a machine that has one"
)


def _advice_not_cached(error: Exception) -> str:
    from huggingface_hub import errors

    match error.__cause__:
        case None | errors.OfflineModeIsEnabled():
            return _OFFLINE
        case errors.HfHubHTTPError() as cause:
            return _advice_status(cause.response.status_code)
        case cause:
            return (
                f"the Hub cannot be reached ({type(cause).__name__}: {_first_line(cause)}) and the "
                "files are not in the cache; check the network and proxy settings"
            )


def _advice_status(status: int) -> str:
    if status in (401, 403):
        return f"access was refused (HTTP {status}); check that HF_TOKEN is valid and may read it"
    if status == 429:
        return (
            "too many requests (HTTP 429); wait a few minutes, or set HF_TOKEN for a higher limit"
        )
    if status >= 500:
        return f"the Hub has a problem of its own (HTTP {status}); try again later"
    return f"the Hub answered HTTP {status}; check the name and HF_ENDPOINT"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _progress_bar(progress: Progress | None) -> type[Any]:
    """Return a bar for the client that draws nothing and passes its byte counts on."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

    furthest = 0

    class Bar(tqdm):  # type: ignore[misc, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            # The client has a bar for bytes received and one for bytes written; the one that is
            # ahead is reported, so that the number never falls.
            nonlocal furthest
            self.n += n or 0
            if self.counts_bytes and progress is not None and self.n > furthest:
                furthest = int(self.n)
                progress("download", furthest, int(self.total) if self.total else None)

    return Bar
