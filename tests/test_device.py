"""Devices: how they are woken."""

import threading
from types import SimpleNamespace

import pytest

from orcd_jax import device as devices
from orcd_jax.errors import RequestError


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_devices_that_jax_does_not_find(monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(devices, "jax", SimpleNamespace(devices=fail))
    with pytest.raises(RequestError, match="finds no usable device"):
        devices.select_device()


def test_waking_devices_tells_nothing(monkeypatch):
    """What goes wrong is told to who asks for a device, not by a thread."""

    def fail(_):
        raise RuntimeError("no devices")

    monkeypatch.setattr(devices, "jax", SimpleNamespace(device_put=fail))
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    devices.wake()
    for thread in threading.enumerate():
        if thread.name == "wake":
            thread.join()
    assert not told
