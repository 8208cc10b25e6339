"""Kernels for NVIDIA Hopper, one module an op, written with Pallas' Mosaic GPU back end.

Imported when an op is traced for such a device: the ops' own modules need no GPU software.
"""

import jax


def processors() -> int:
    """The SMs of the default device; an H100's where a program is compiled without one."""
    return getattr(jax.devices()[0], "core_count", None) or 132
