"""Kernels for NVIDIA Hopper, one module an op, written with Pallas' Mosaic GPU back end.

Imported when an op is traced for such a device: the ops' own modules need no GPU software.
"""
