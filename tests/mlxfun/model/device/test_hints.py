"""What is said about the device: once, and only where it is true."""

from __future__ import annotations

import pytest

from mlxfun.context import Context
from mlxfun.model.device import hints as device_hints
from mlxfun.model.device.hints import COMPILING, announce, blas_hint, reference_blas

WHEEL = "/lib/python3/site-packages/mlx_cpu.libs/libblas-bd8a282c.so.3.10.0"
NUMPY = "/lib/python3/site-packages/numpy.libs/libscipy_openblas64_-8fb3d286.so"
PRELOADED = "/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblasp-r0.3.21.so"


class Heard(Context):
    def __init__(self) -> None:
        self.said = []

    def emit(self, event) -> None:
        self.said.append(event.text)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(device_hints, "_said", set())
    blas_hint.cache_clear()
    yield
    blas_hint.cache_clear()


def on(monkeypatch, device: str, files: list[str], platform: str = "linux") -> None:
    monkeypatch.setattr(device_hints, "on_cpu", lambda: device == "cpu")
    monkeypatch.setattr(device_hints, "on_cuda", lambda: device == "cuda")
    monkeypatch.setattr(device_hints, "_loaded_files", lambda: files)
    monkeypatch.setattr(device_hints.sys, "platform", platform)


@pytest.mark.parametrize(
    ("files", "slow"),
    [([WHEEL], True), ([WHEEL, NUMPY], True), ([WHEEL, PRELOADED], False), ([NUMPY], False)],
)
def test_a_preloaded_blas_is_told_from_the_one_that_the_wheel_brings(files, slow) -> None:
    assert reference_blas(files) is slow


def test_the_slow_blas_is_named_once_with_its_remedy(monkeypatch) -> None:
    on(monkeypatch, "cpu", [WHEEL])
    heard = Heard()
    announce(heard)
    announce(heard)
    assert len(heard.said) == 1
    assert "LD_PRELOAD=" in heard.said[0]
    assert "ten times" in heard.said[0]


@pytest.mark.parametrize(
    ("device", "files", "platform"),
    [("cpu", [WHEEL, PRELOADED], "linux"), ("cpu", [WHEEL], "darwin"), ("metal", [], "darwin")],
)
def test_nothing_is_said_where_there_is_nothing_to_say(
    monkeypatch, device, files, platform
) -> None:
    on(monkeypatch, device, files, platform)
    heard = Heard()
    announce(heard)
    assert heard.said == []


def test_compiling_on_cuda_is_named_as_such_once(monkeypatch) -> None:
    on(monkeypatch, "cuda", [])
    heard = Heard()
    announce(heard)
    announce(heard)
    assert heard.said == [COMPILING]
