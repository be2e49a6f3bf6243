"""Convolutions, depthwise ones and pools for a GPU: how results are cut, and what the kernels take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil, prod
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tvm import tirx

from netlathe.backends.tvm.cuda import conv_hopper, warpgroup
from netlathe.backends.tvm.cuda.artifact import CudaArtifact
from netlathe.backends.tvm.cuda.groups import Groups
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, Gpu, gpu
from netlathe.backends.tvm.cuda.toolkit import Resources
from netlathe.backends.tvm.kernel import SCHEDULE
from netlathe.backends.tvm.lowering import Lowering
from netlathe.ir import normal
from tests.backends.cuda.test_cuda_compile import _has_nvcc
from tests.backends.cuda.test_cuda_run import BOUNDS, HALVES, HERE, OnGpu, OnMma


def window(kind: str, size: int, stride: int = 1, group: int = 1, dilation: int = 1) -> str:
    """A node's attributes."""
    pad = dilation * (size // 2)
    how = f"strides = [{stride}, {stride}], pads = [{pad}, {pad}, {pad}, {pad}]"
    if kind == "pool":
        return f"{how}, kernel_shape = [{size}, {size}]"
    return f"{how}, dilations = [{dilation}, {dilation}], group = {group}"


def network(
    half: str, image: str, body: str, out: str, shapes: Mapping[str, tuple[int, ...]]
) -> Any:
    """A model of one input ``x`` and one output ``y`` with random constants, and the constants."""
    rng = np.random.default_rng(3)
    model = ir.from_onnx_text(
        f"""<ir_version: 12, opset_import: ["" : 22]>
        g ({half}[{image}] x) => ({half}[{out}] y) {{ {body} }}"""
    )
    used = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    made = {}
    for name, shape in shapes.items():
        made[name] = (rng.standard_normal(shape) / prod(shape[1:]) ** 0.5).astype(HALVES[half])
        value = used[name]
        value.const_value = ir.Tensor(made[name], dtype=ir.DataType.from_numpy(made[name].dtype))
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(shape)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model, made


def every_kind(half: str) -> ir.Model:
    """A stem of 3 channels, a pool, windows of 3 x 3 with strides, groups, a residual, and depthwise ones."""
    body = f"""
        a = Conv <{window("conv", 7, 2)}> (x, stem)
        b = Relu (a)
        c = MaxPool <{window("pool", 3, 2)}> (b)
        d = Conv <{window("conv", 3)}> (c, deep)
        e = Add (d, c)
        f = Conv <{window("conv", 3, 2)}> (e, wide)
        j = Conv <{window("conv", 3, 1, 32)}> (f, small)
        k = Conv <{window("conv", 3, 1, 2)}> (j, half)
        h = Conv <{window("conv", 1)}> (k, mixed)
        i = Conv <{window("conv", 3, 1, 300)}> (h, own)
        y = Transpose <perm = [0, 2, 3, 1]> (i)"""
    shapes = {
        "stem": (64, 3, 7, 7),
        "deep": (64, 64, 3, 3),
        "wide": (128, 64, 3, 3),
        "small": (96, 4, 3, 3),
        "half": (128, 48, 3, 3),
        "mixed": (300, 128, 1, 1),
        "own": (300, 1, 3, 3),
    }
    model: ir.Model = network(half, "8, 3, 112, 112", body, "8, 14, 14, 300", shapes)[0]
    return model


def in_groups(half: str, groups: Groups, stride: int) -> tuple[ir.Model, dict[str, Any]]:
    """Windows of 3 x 3 over places of 11 x 14, whose channels are last in the model already."""
    inputs, outputs = groups.count * groups.inputs, groups.count * groups.outputs
    body = f"""
        t = Transpose <perm = [0, 3, 1, 2]> (x)
        y = Conv <{window("conv", 3, stride, groups.count)}> (t, w)"""
    model, made = network(
        half,
        f"3, 11, 14, {inputs}",
        body,
        f"3, {outputs}, h, v",
        {"w": (outputs, groups.inputs, 3, 3)},
    )
    return model, made


# -- boxes and tiles -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [112, 56, 28, 14, 7])
def test_boxes_of_resnet_waste_nothing(size: int) -> None:
    box = conv_hopper.box(64, size, size, (1, 1))
    each = (box.images, box.rows, box.columns)
    assert box.places == conv_hopper.PLACES
    assert all(whole % part == 0 for whole, part in zip((64, size, size), each, strict=True))


@pytest.mark.parametrize("stride", [1, 2, 7])
def test_boxes_fit_a_warpgroup_and_the_copy_engine(stride: int) -> None:
    rng = np.random.default_rng(stride)
    for images, rows, columns in rng.integers(1, 200, (50, 3)).tolist():
        box = conv_hopper.box(images, rows, columns, (stride, stride))
        assert 0 < box.places <= conv_hopper.PLACES
        assert (box.rows - 1) * stride < 256 and (box.columns - 1) * stride < 256
        count = ceil(images / box.images) * ceil(rows / box.rows) * ceil(columns / box.columns)
        square = images * ceil(rows / 8) * ceil(columns / 8)
        assert count <= square or stride == 7  # 8 x 8 places are always one of the choices


def test_tiles_fit_and_keep_every_multiprocessor_busy() -> None:
    most = ARCHITECTURES["sm_90a"][1]
    for shape in conv_hopper.SHAPES:
        assert shape.shared_bytes <= most
        assert (shape.shared_bytes + 1024) * shape.blocks <= most + 1024
    # 49 boxes by 512 outputs: wide tiles would leave most of the GPU without work.
    small = conv_hopper.chosen(49, Groups(1, 512, 512), 72)
    assert ceil(49 / 2) * 512 // small.columns >= 100
    assert conv_hopper.chosen(1 << 14, Groups(1, 64, 64), 9).columns == 64
    assert conv_hopper.chosen(None, Groups(1, 256, 256), 36).columns == 256
    assert conv_hopper.chosen(1 << 14, Groups(32, 4, 4), 9).columns == 64


@pytest.mark.parametrize(
    "groups, together, deep, wide",
    [
        (Groups(1, 3, 70), 1, 8, 70),
        (Groups(32, 4, 4), 16, 64, 64),
        (Groups(9, 24, 24), 2, 48, 48),
        (Groups(4, 112, 112), 1, 112, 112),
        (Groups(33, 1, 2), 32, 32, 64),
        (Groups(11, 6, 4), 11, 72, 44),  # all of them: nothing else has to begin at whole pieces
        (Groups(50, 3, 3), 16, 48, 48),
        (Groups(2, 65, 65), 0, 0, 0),
    ],
)
def test_bundles_of_groups_begin_at_whole_pieces(
    groups: Groups, together: int, deep: int, wide: int
) -> None:
    assert (groups.together, groups.deep, groups.wide) == (together, deep, wide)
    if together:
        assert groups.bundles == ceil(groups.count / together)
        assert groups.bundles == 1 or together * groups.inputs % 8 == 0


# -- code ------------------------------------------------------------------------------------------


def kernels(model: ir.Model, arch: str) -> dict[str, str]:
    """The text of every kernel by its schedule; the last one of each."""
    module = Lowering(model, gpu([arch])).run().module
    return {
        str(function.attrs[SCHEDULE]): function.script()
        for _, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc) and SCHEDULE in function.attrs
    }


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_neighbouring_results_leave_together(half: str) -> None:
    """Four halves are 8 bytes, where rows of channels are whole vectors."""
    found = kernels(every_kind(half), "sm_90a")
    assert found.keys() >= {
        "conv.warpgroups",
        "conv.depthwise",
        "conv.padded",
        "pool.channels_last",
    }
    for text in found.values():
        assert "netlathe_put<8>" in text
    odd = network(
        half,
        "1, 64, 9, 9",
        f"y = Conv <{window('conv', 3)}> (x, w)",
        "1, 70, 9, 9",
        {"w": (70, 64, 3, 3)},
    )[0]
    assert "netlathe_put" not in kernels(odd, "sm_90a")["conv.warpgroups"]


def test_older_gpus_gather_with_warps() -> None:
    found = kernels(every_kind("float16"), "sm_80")
    assert "conv.warps" in found and "conv.warpgroups" not in found


@pytest.mark.parametrize(
    ("inputs", "stride", "kind"), [(3, 8, "groups"), (3, 9, "s"), (64, 9, "s")]
)
def test_strides_beyond_the_copy_engine_are_gathered(inputs: int, stride: int, kind: str) -> None:
    how = f"strides = [{stride}, {stride}]"
    model = network(
        "float16",
        f"2, {inputs}, 72, 72",
        f"y = Conv <{how}> (x, w)",
        f"2, 16, {72 // stride}, {72 // stride}",
        {"w": (16, inputs, stride, stride)},
    )[0]
    assert f"conv.warp{kind}" in kernels(model, "sm_90a")


@pytest.mark.parametrize(
    ("channels", "groups", "size", "kind"),
    [(128, 32, 3, "warp"), (224, 2, 3, "warp"), (240, 3, 1, "warp"), (130, 2, 3, "gemm.blocks")],
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_what_takes_groups(channels: int, groups: int, size: int, kind: str, arch: str) -> None:
    """Tensor cores do, if a bundle of them can begin at a whole piece of channels."""
    model = network(
        "float16",
        f"2, {channels}, 9, 9",
        f"y = Conv <{window('conv', size, 1, groups)}> (x, w)",
        f"2, {channels}, 9, 9",
        {"w": (channels, channels // groups, size, size)},
    )[0]
    wanted = {"sm_80": "conv.warps", "sm_90a": "conv.warpgroups"}[arch] if kind == "warp" else kind
    assert wanted in kernels(model, arch)


@pytest.mark.parametrize(
    ("groups", "over"),
    [
        (Groups(1, 96, 96), 0),
        (Groups(32, 4, 4), 0),
        (Groups(2, 112, 112), 0),
        (Groups(11, 6, 4), 0),
        (Groups(24, 4, 4), 32),
        (Groups(9, 24, 24), 24),
        (Groups(33, 1, 2), 24),
        (Groups(50, 3, 3), 40),
    ],
)
@pytest.mark.parametrize(("arch", "stride"), [("sm_80", 1), ("sm_90a", 9)])
def test_last_bundles_are_not_gathered_beyond_their_place(
    groups: Groups, over: int, arch: str, stride: int
) -> None:
    """What a last bundle of fewer groups lacks is asked for where there is such a bundle, and only there."""
    text = kernels(in_groups("float16", groups, stride)[0], arch)["conv.warps"]
    inputs, deep = map(int, re.findall(r"::convolve<(\d+), (\d+),", text)[0])
    first = (groups.bundles - 1) * groups.together * groups.inputs
    assert max(first + deep - inputs, 0) == over
    assert (inputs % deep > 0) == (over > 0)
    assert "kInputs % kDeep == 0 || first_channel + channel < kInputs" in text


def test_nothing_is_launched_for_no_images() -> None:
    """There is no descriptor of an empty tensor."""
    body = f"y = Conv <{window('conv', 3)}> (x, w)"
    model = network("float16", "b, 64, h, v", body, "b, 32, h, v", {"w": (32, 64, 3, 3)})[0]
    text = kernels(model, "sm_90a")["conv.warpgroups"]
    assert re.search(r"if .*> T.int64\(0\):", text[: text.index("tensormap_encode_tiled")])


@pytest.mark.skipif(not _has_nvcc(), reason="nvcc is not installed")
def test_nothing_spills() -> None:
    artifact = CudaArtifact(every_kind("float16"), gpu(["sm_90a"]))
    found: tuple[Resources, ...] = artifact._built.resources  # type: ignore[attr-defined]
    stems = {re.sub(r"_\d+_kernel$", "", r.kernel) for r in found}
    assert stems >= {"conv_warpgroups", "conv_depthwise", "conv_padded", "pool_channels_last"}
    for r in found:
        assert r.spill_bytes == 0 and r.stack_bytes == 0, r
        threads = warpgroup.THREADS if r.kernel.startswith("conv_warpgroups") else 256
        assert r.registers * threads <= 65536, r


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.skipif(not HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("channels", [37, 48])
@pytest.mark.parametrize(("size", "stride", "dilation"), [(3, 1, 1), (5, 2, 1), (3, 2, 2)])
def test_windows(half: str, channels: int, size: int, stride: int, dilation: int) -> None:
    import torch

    own = window("conv", size, stride, channels, dilation)
    body = f"""
        a = Conv <{own}> (x, own)
        y = MaxPool <{window("pool", 3, 2)}> (a)"""
    model, made = network(
        half,
        f"3, {channels}, 19, 23",
        body,
        f"3, {channels}, h, v",
        {"own": (channels, 1, size, size)},
    )
    x = np.random.default_rng(2).standard_normal((3, channels, 19, 23)).astype(HALVES[half])
    found = OnGpu(model, gpu([HERE[-1]])).run({"x": x})["y"].astype(np.float64)
    image, taps = (torch.from_numpy(a.astype(np.float64)) for a in (x, made["own"]))
    pad = dilation * (size // 2)
    wanted = torch.conv2d(image, taps, None, stride, pad, dilation, channels)
    wanted = torch.max_pool2d(wanted, 3, 2, 1)
    assert found.shape == tuple(wanted.shape)
    assert np.linalg.norm(found - wanted.numpy()) / float(wanted.norm()) < BOUNDS[half]


@pytest.mark.skipif(not HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize(("machine", "stride"), [(Gpu, 1), (Gpu, 2), (Gpu, 9), (OnMma, 1)])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "groups",
    [Groups(24, 4, 4), Groups(3, 48, 24), Groups(33, 1, 2), Groups(2, 112, 112), Groups(11, 6, 4)],
)
def test_groups(machine: type[Gpu], stride: int, half: str, groups: Groups) -> None:
    """No bundle reads what is behind its place: not the next one, not what is behind the last one."""
    import torch

    model, made = in_groups(half, groups, stride)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 11, 14, groups.count * groups.inputs)).astype(HALVES[half])
    program = OnGpu(model, machine(**vars(gpu([HERE[-1]]))))
    found = program.run({"x": x}, behind=64)["y"].astype(np.float64)
    image = torch.from_numpy(np.moveaxis(x.astype(np.float64), -1, 1))
    weight = torch.from_numpy(made["w"].astype(np.float64))
    wanted = torch.conv2d(image, weight, None, stride, 1, 1, groups.count).numpy()
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < BOUNDS[half]
    x[..., 0] = np.nan
    other = program.run({"x": x})["y"][:, groups.wide :].astype(np.float64)
    assert np.array_equal(other, found[:, groups.wide :])
