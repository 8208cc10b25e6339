"""Kernels for NVIDIA Hopper, one module an op, written with Pallas' Mosaic GPU back end.

Imported when an op is traced for such a device: the ops' own modules need no GPU software.
"""

from typing import TypeVar

import jax

Arrays = TypeVar("Arrays")


def processors() -> int:
    """The SMs of the default device; an H100's where a program is compiled without one."""
    return getattr(jax.devices()[0], "core_count", None) or 132


def materialised(arrays: Arrays) -> Arrays:
    """Arrays that exist as such in memory, for a kernel that changes others in place.

    XLA lets a kernel read slices where they lie in larger arrays (its dynamic slice fusion), and then forgets that the
    kernel's results are its operands, changed: they would be somewhere else, and hold what was there.
    """
    return jax.lax.optimization_barrier(arrays)
