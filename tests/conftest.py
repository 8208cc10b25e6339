"""Shared fixtures: strict JAX promotion rules, and the real files that some tests read."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


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
