"""A trained network as an ONNX graph that takes pictures of any size.

PyTorch's exporter records the network as it runs on a CPU; each of our operators brings its form in ONNX's operations
here. Routing has no noise, as in evaluation. The scan is ONNX's `Scan`: one step a token, slower than our kernels.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import contextlib
import io
import logging
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from mambair_ds.config import UserError
from mambair_ds.kernels.depthwise_conv.operator import EPS
from mambair_ds.kernels.window_attention.reference import relative_position_index
from mambair_ds.models.mambairv2 import MambaIRv2

try:
    from onnxscript import FLOAT, graph, opset18, script
    from onnxscript.values import Opset
except ImportError as error:
    raise UserError(f"ONNX export: pip install 'mambair-ds[onnx]' brings what it needs ({error})") from error

op: Any = opset18
_OURS = Opset("mambair_ds", 1)
_END = 2**31 - 1  # behind the end of every side


def export(network: MambaIRv2, path: Path) -> None:
    """Write the network to an ONNX file: input "lq" (B, C, H, W) and output "restored", float32, any B, H and W.

    Args:
        network: float32, on the CPU.
        path: the file; of networks larger than 2 GB another one lies beside it.

    Raises:
        UserError: the file cannot be written.
    """
    config = network.config
    example = torch.rand(2, config.in_chans, 2 * config.window_size + 3, config.window_size + 5)
    sizes = {0: "batch", 2: "height", 3: "width"}
    dynamic = {place: torch.export.Dim.DYNAMIC for place in sizes}
    # The exporter knows no regions of autocast; in float32 they change nothing.
    no_autocast = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with torch.no_grad(), no_autocast, _quiet():
        program = torch.onnx.export(
            network.eval(),
            (example,),
            dynamo=True,
            input_names=["lq"],
            output_names=["restored"],
            dynamic_shapes=(dynamic,),
            opset_version=18,
            custom_translation_table=_translations(),
        )
    assert program is not None
    try:
        program.save(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write it: {error.strerror or error}") from error


@contextlib.contextmanager
def _quiet():
    """The exporter tells its progress; that is not for our users."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def _translations() -> dict[Any, Any]:
    """What every operator of ours becomes, by the name under which PyTorch records it on a CPU."""
    from mambair_ds import kernels

    for operator in (kernels.depthwise_conv, kernels.routing, kernels.selective_scan, kernels.window_attention):
        kernels.load_backend(operator.__name__.rsplit(".", 1)[1], operator._FILES, "cpu", None)
    ours = torch.ops.mambair_ds
    return {
        ours.selective_scan_cpu.default: _selective_scan,
        ours.window_attention_cpu.default: _window_attention,
        ours.depthwise_conv_cpu.default: _depthwise_conv,
        ours.choose_class_cpu.default: _choose_class,
        ours.class_order_cpu.default: _class_order,
        ours.class_prompt_cpu.default: _class_prompt,
        torch.ops.aten.remainder.Scalar: _remainder,
    }


def _ints(*values: int):
    return op.Constant(value_ints=list(values))


def _side(x, dim: int):
    """The length of a dimension, (1,) int64."""
    return op.Shape(x, start=dim, end=dim + 1)


def _choose_class(scores, noise=None, positions=None, seed=0, stream=0):
    return op.ArgMax(op.Softmax(op.LogSoftmax(scores, axis=-1), axis=-1), axis=-1, keepdims=0)


def _class_order(index, classes):
    """A stable sort: the smallest of keys that no two tokens share."""
    tokens = _side(index, 1)
    place = op.Range(op.Constant(value_int=0), op.Squeeze(tokens), op.Constant(value_int=1))
    _, order = op.TopK(op.Add(op.Mul(index, tokens), place), tokens, axis=1, largest=0, sorted=1)
    return order, op.Identity(order)  # nobody asks for the inverse


def _class_prompt(scores, table, index, noise=None, positions=None, seed=0, stream=0):
    return op.Gather(table, index, axis=0)


def _remainder(x, divisor):
    """PyTorch's own form takes no divisor that depends on the picture's size."""
    return op.Mod(x, divisor)


@script(_OURS, default_opset=op)
def _Scan(u: FLOAT, delta: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT) -> FLOAT:
    """state = exp(delta · A) · state + delta · u · B; y = state · C, step by step along the second dimension."""

    @graph()
    def step(state, u_t, delta_t, B_t, C_t):
        wide = op.Unsqueeze(delta_t, op.Constant(value_ints=[2]))
        input = op.Unsqueeze(delta_t * u_t, op.Constant(value_ints=[2]))
        new = op.Exp(wide * A) * state + input * op.Unsqueeze(B_t, op.Constant(value_ints=[1]))
        y = op.MatMul(new, op.Unsqueeze(C_t, op.Constant(value_ints=[2])))
        return new, op.Squeeze(y, op.Constant(value_ints=[2]))

    batch = op.Shape(u, start=0, end=1)
    zeros = op.Expand(op.Constant(value_float=0.0), op.Concat(batch, op.Shape(A), axis=0))
    _, y = op.Scan(
        zeros, u, delta, B, C, body=step, num_scan_inputs=4, scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1]
    )
    return y


def _selective_scan(u, delta, A, B, C, D, delta_bias, prompt, order, delta_softplus):
    rows = op.Unsqueeze(order, _ints(2))
    sorted_u, delta, B, C = (op.GatherND(x, rows, batch_dims=1) for x in (u, delta, B, C))
    delta = op.Add(delta, delta_bias)
    if delta_softplus:
        delta = op.Softplus(delta)
    if prompt is not None:
        C = op.Add(C, prompt)
    y = op.Add(_Scan(sorted_u, delta, A, B, C), op.Mul(D, sorted_u))
    y = op.ScatterElements(y, op.Expand(rows, op.Shape(y)), y, axis=1)
    return y, op.Identity(y)  # nobody asks for the states


def _depthwise_conv(x, weight, bias, gate, norm_weight, norm_bias, epilogue):
    if norm_weight is not None:
        x = op.LayerNormalization(x, norm_weight, norm_bias, axis=-1, epsilon=EPS)
    margin = weight.shape[-1] // 2
    planes = op.Transpose(x, perm=[0, 3, 1, 2])
    c = op.Conv(planes, weight, bias, group=weight.shape[0], pads=[margin] * 4)
    c = op.Transpose(c, perm=[0, 2, 3, 1])
    if epilogue == "gelu_residual":
        half = op.Mul(c, op.Constant(value_float=0.5))
        gelu = op.Mul(half, op.Add(op.Erf(op.Mul(c, op.Constant(value_float=0.5**0.5))), op.Constant(value_float=1.0)))
        return op.Add(x, gelu)
    if epilogue == "sigmoid_gate":
        return op.Mul(x, op.Sigmoid(c))
    return c if gate is None else op.Mul(gate, c)


def _window_attention(qkv, table, num_heads, window_size, shift):
    w, area, channels = window_size, window_size**2, qkv.shape[-1] // 3
    width = channels // num_heads
    height_side, width_side = _side(qkv, 1), _side(qkv, 2)
    down, across = op.Div(height_side, _ints(w)), op.Div(width_side, _ints(w))
    windows = op.Mul(down, across)
    cut = op.Concat(_side(qkv, 0), down, _ints(w), across, _ints(w, 3, num_heads, width), axis=0)
    parts = op.Transpose(op.Reshape(_roll(qkv, shift), cut), perm=[5, 0, 1, 3, 6, 2, 4, 7])
    by_window = op.Concat(_ints(3), _side(qkv, 0), windows, _ints(num_heads, area, width), axis=0)
    parts = op.Reshape(parts, by_window)
    q, k, v = (op.Gather(parts, op.Constant(value_int=i), axis=0) for i in range(3))
    index = op.Constant(value_ints=relative_position_index(w).flatten().tolist())
    bias = op.Reshape(op.Transpose(op.Gather(table, index, axis=0), perm=[1, 0]), _ints(num_heads, area, area))
    logits = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 2, 4, 3])), op.Constant(value_float=width**-0.5))
    logits = op.Add(logits, bias)
    if shift:
        logits = op.Add(logits, _mask(height_side, width_side, down, across, windows, w, shift))
    y = op.MatMul(op.Softmax(logits, axis=-1), v)
    y = op.Reshape(y, op.Concat(_side(qkv, 0), down, across, _ints(num_heads, w, w, width), axis=0))
    whole = op.Concat(_side(qkv, 0), height_side, width_side, _ints(channels), axis=0)
    y = _roll(op.Reshape(op.Transpose(y, perm=[0, 1, 4, 2, 5, 3, 6]), whole), -shift)
    return y, op.Identity(y)  # nobody asks for the sums


def _roll(x, shift: int):
    """Up and to the left by `shift` (down and to the right if below 0)."""
    if shift == 0:
        return x
    for axis in (1, 2):
        first = op.Slice(x, _ints(shift), _ints(_END), _ints(axis))
        x = op.Concat(first, op.Slice(x, _ints(0), _ints(shift), _ints(axis)), axis=axis)
    return x


def _mask(height, width, down, across, windows, w: int, shift: int):
    """-100 between pixels of a window that the roll brought together, (windows, 1, w², w²)."""
    rows, columns = (
        op.Cast(op.GreaterOrEqual(_range(side), op.Sub(side, _ints(shift))), to=7) for side in (height, width)
    )
    region = op.Add(op.Mul(op.Unsqueeze(rows, _ints(1)), _ints(2)), op.Unsqueeze(columns, _ints(0)))
    region = op.Reshape(region, op.Concat(down, _ints(w), across, _ints(w), axis=0))
    region = op.Reshape(op.Transpose(region, perm=[0, 2, 1, 3]), op.Concat(windows, _ints(w * w), axis=0))
    same = op.Equal(op.Unsqueeze(region, _ints(1, 3)), op.Unsqueeze(region, _ints(1, 2)))
    return op.Where(same, op.Constant(value_float=0.0), op.Constant(value_float=-100.0))


def _range(side):
    return op.Range(op.Constant(value_int=0), op.Squeeze(side), op.Constant(value_int=1))


def run(path: Path, lq: np.ndarray) -> np.ndarray:
    """Restore lq (B, C, H, W) float32 with an exported network in onnxruntime, to compare.

    Raises:
        UserError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"pip install 'mambair-ds[onnx]' brings what it needs ({error})") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    restored: np.ndarray = session.run(None, {"lq": lq})[0]
    return restored
