"""Programs kept on disk: found again without tracing, only where nothing that they depend on has changed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orcd_jax import programs

ROOT = Path(__file__).parents[1]
CPU = jax.devices("cpu")[0]
X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(programs, "_folder", lambda device: tmp_path / "programs")
    return tmp_path / "programs"


def kept(function=jnp.sin, *what, args=(X,)):
    """A program, and how often it was compiled."""
    compiled = []

    def compile():
        compiled.append(function)
        return jax.jit(lambda *a: {"y": function(*a)}).lower(*args).compile()

    return programs.kept(compile, CPU, args, function.__name__, *what), len(compiled)


def test_a_program_is_found_again(folder):
    made, compilations = kept()
    assert compilations == 1 and len(list(folder.iterdir())) == 1
    found, compilations = kept()
    assert compilations == 0
    np.testing.assert_array_equal(made(X)["y"], found(X)["y"])


def test_a_program_is_not_found_for_anything_else(folder, monkeypatch):
    kept()
    for change in (
        lambda: kept(jnp.cos),
        lambda: kept(jnp.sin, "static"),
        lambda: kept(args=(X[:1],)),
        lambda: kept(args=(X.astype(np.float16),)),
        lambda: kept(lambda x: x["x"], args=({"x": X},)),
    ):
        assert change()[1] == 1
    with jax.default_matmul_precision("highest"):
        assert kept()[1] == 1
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_dump_to=nowhere")
        assert kept()[1] == 1
    with monkeypatch.context() as patch:
        patch.setattr(programs, "_SOURCE", "another version")
        assert kept()[1] == 1
    with monkeypatch.context() as patch:
        patch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.2")  # how much memory there is, not what runs in it
        assert kept()[1] == 0
    assert kept()[1] == 0


def test_a_damaged_program_is_made_anew(folder):
    kept()
    (file,) = folder.iterdir()
    content = file.read_bytes()
    for damaged in (b"", b"garbage", content[: len(content) // 2]):
        file.write_bytes(damaged)
        program, compilations = kept()
        assert compilations == 1
        np.testing.assert_array_equal(program(X)["y"], jnp.sin(X))
        assert kept()[1] == 0


def test_a_program_that_cannot_be_kept_runs(folder):
    folder.write_text("a file in the folder's place")
    assert kept()[1] == 1
    np.testing.assert_array_equal(kept()[0](X)["y"], jnp.sin(X))


def test_errors_of_compiling_are_told(folder):
    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        programs.kept(fail, CPU, (X,))
    assert not folder.exists()


def test_programs_are_kept_on_gpus_where_jax_keeps_its_own(monkeypatch, tmp_path):
    gpu = SimpleNamespace(platform="gpu")
    settings = SimpleNamespace(jax_compilation_cache_dir=str(tmp_path), jax_enable_compilation_cache=True)
    monkeypatch.setattr(programs, "jax", SimpleNamespace(config=settings))
    assert programs._folder(gpu) == tmp_path
    assert programs._folder(CPU) is None
    for name, value in (("jax_compilation_cache_dir", None), ("jax_compilation_cache_dir", "gs://bucket/programs"),
                        ("jax_enable_compilation_cache", False)):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(settings, name, value)
            assert programs._folder(gpu) is None


def test_a_second_start_traces_nothing(tiny, tmp_path):
    """The same tokens and log-probabilities from what another process has kept."""
    script = f"""
import sys
from pathlib import Path
import orcd_jax
from orcd_jax import decoding, programs

programs._folder = lambda device: Path({str(tmp_path)!r})
model = orcd_jax.load({str(tiny("qwen2"))!r})
if sys.argv[1:]:
    decoding.hidden_states = decoding.head = None  # what is traced calls these
sampling = orcd_jax.Sampling(temperature=1.0)
(completion,) = model.generate([[1, 2, 3]], 12, sampling, seed=5, ignore_eos=True, logprobs=2)
print(completion.token_ids, completion.logprobs, model.memory()["workspace_bytes"])
"""
    # Without JAX's own cache: on a CPU, what it has found cannot be kept again.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}

    def run(*arguments):
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    first = run()
    assert first and run("again") == first
