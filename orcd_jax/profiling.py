"""Looking inside: profiler traces and XLA dumps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def trace(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Record what runs inside the block as a trace for xprof, and for Perfetto (`perfetto_trace.json.gz`).

    Run the same request once before, so that compilation is not in the trace. Steps take longer than they do without
    the profiler, under which some versions of XLA capture no command buffers.
    """
    import jax

    Path(folder).mkdir(parents=True, exist_ok=True)
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        yield


def dump_xla(folder: str | os.PathLike[str]) -> None:
    """Make XLA write every program that it compiles to `folder`: HLO before and after optimisation, buffers, thunks.

    Call it before JAX is used. The compilation cache is switched off: what is found there would not be compiled.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    flags = f"--xla_dump_to={os.fspath(folder)} --xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
