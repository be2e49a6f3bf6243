"""What a GPU can do at best, as far as that is reckoned without one."""

from __future__ import annotations

import pytest

from netlathe.backends.tvm import runtime
from netlathe.diagnostics import InputError
from netlathe.execute import gpu
from netlathe.execute.timing import Timing


def test_the_peak_is_what_is_published() -> None:
    """Dense products of halves with sums in float32: 312 TFLOP/s of an A100, 989.4 of an H100 SXM."""
    assert gpu.operations(8, 0, 108, 1_410_000) == pytest.approx(312e12, rel=1e-3)
    assert gpu.operations(9, 0, 132, 1_830_000) == pytest.approx(989.4e12, rel=1e-3)
    assert gpu.operations(8, 9, 142, 2_490_000) == pytest.approx(362e12, rel=1e-2)  # L40S


def test_a_minor_version_has_the_rate_of_the_one_before() -> None:
    assert gpu.operations(8, 7, 16, 1_300_000) == gpu.operations(8, 6, 16, 1_300_000)


def test_no_rate_is_made_up() -> None:
    with pytest.raises(InputError, match="capability 12"):
        gpu.operations(12, 0, 170, 2_400_000)


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_attribute", {75: 9, 76: 0, 16: 132, 13: 1_980_000}.__getitem__)
    found = gpu.ceilings({gpu.COPY: Timing(2.4, 2.0, 2.8, 3)})
    assert found.float_ops == 132 * 1.98e9 * 4096 and found.byte_ops == 2 * found.float_ops
    assert found.bytes == pytest.approx(2 * 2**30 / 0.5e-3)


class NoRoom:
    """CUDA's runtime where memory is used up."""

    def cudaMalloc(self, *_: object) -> int:
        return 2


def test_no_room_for_a_copy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_cuda_runtime", lambda _: NoRoom())
    with pytest.raises(
        InputError, match=r"taking memory failed on the GPU: CUDA error 2(.|\n)*2 GiB"
    ):
        gpu.copies()
