"""The operators' jobs in the network: their inputs, ours, the peers, and what a job costs any hardware at least."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mamba_ssm_peer
import published
import torch
from disassembly import Shape
from torch import Tensor

from mambair_ds.kernels.depthwise_conv import Epilogue, depthwise_conv
from mambair_ds.kernels.linear import linear
from mambair_ds.kernels.philox import KeyedNoise, NoiseKey, gumbel
from mambair_ds.kernels.routing import choose_class, class_order, class_prompt
from mambair_ds.kernels.selective_scan import selective_scan
from mambair_ds.kernels.window_attention import window_attention

Tensors = dict[str, Tensor]
Function = Callable[..., Tensor | tuple[Tensor, ...]]

GELU, SIGMOID, NORM, GUMBEL = 14, 4, 6, 28
"""Instructions for one number besides exponentials and logarithms; most of GUMBEL's are Philox's."""


@dataclass(frozen=True)
class Work:
    """The least that one token costs in one direction."""

    values: float
    """Activations that must be read or written, each once."""
    floats: float = 0
    """Multiply-adds, or what takes as long, outside of matrix products."""
    special: float = 0
    """Exponentials and logarithms."""
    matrix: float = 0
    """Floating-point operations of matrix products, a multiply-add being two."""
    indices: int = 0
    """64-bit integers that must be read or written."""


@dataclass(frozen=True)
class Side:
    """One way to do a job."""

    name: str
    function: Function
    inputs: Tensors
    """Its keyword arguments, of which it differentiates the floating-point ones."""
    once: bool = False
    """Too slow for more than one run."""


@dataclass(frozen=True)
class Job:
    """An operator at a shape."""

    ours: Side
    expected: Function
    """What ours must agree with, given its inputs in float32."""
    activations: frozenset[str]
    """Inputs that have the batch in front; the others are parameters."""
    peers: list[Side]
    forward: Work
    backward: Work


class Maker:
    """Draws the inputs."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1, mean: float = 0) -> Tensor:
        """Normally distributed, in the run's dtype."""
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale + mean).to(self.dtype)

    def picture(self, shape: Shape, channels: int) -> Tensor:
        """(B, H, W, channels)."""
        return self.normal(shape.batch, shape.side, shape.side, channels)

    def norm(self, width: int) -> Tensors:
        """A LayerNorm's parameters."""
        return {"gamma": self.normal(width, scale=0.1, mean=1), "beta": self.normal(width, scale=0.1)}


def scan(shape: Shape, make: Maker, mamba: ModuleType | None) -> Job:
    """In the order of classes, with the prompt. mamba-ssm's gets its inputs in that order and in its layout.

    An update h = exp(ΔA)·h + Δu·B and its part of y: an exponential, two products, two multiply-adds. Going back, an
    exponential and eleven: the update again, h's gradient and its product with the decay, what Δ and A have in common,
    and the sums for B, C, Δu, Δ and A.
    """
    b, length, d, n = shape.batch, shape.length, shape.hidden, shape.states
    classes = torch.randint(shape.classes, (b, length), generator=make.generator, device=make.device)
    inputs = {name: make.normal(b, length, d, scale=scale) for name, scale in (("u", 1), ("delta", 0.5))}
    inputs |= {name: make.normal(b, length, n, scale=scale) for name, scale in (("B", 1), ("C", 1), ("prompt", 0.1))}
    inputs["order"] = classes.argsort(dim=-1, stable=True)
    activations = frozenset(inputs)
    inputs["A"] = -torch.arange(1.0, n + 1, device=make.device).repeat(d, 1)
    inputs |= {"D": make.normal(d, mean=1).float(), "delta_bias": make.normal(d, mean=-4).float()}
    loop = functools.partial(selective_scan, backend="reference")
    peers = [Side("reference loop", loop, inputs, once=True)]
    if mamba is not None:
        theirs = inputs | {name: inputs[name].mT.contiguous() for name in ("u", "delta")}
        theirs |= {name: inputs[name].mT[:, None].contiguous() for name in ("B", "C")}
        del theirs["prompt"], theirs["order"]
        peers.insert(0, Side("mamba-ssm", functools.partial(mamba_ssm_peer.scan, mamba), theirs))
    forward = Work(3 * d + 3 * n, 4 * d * n, d * n, indices=1)
    backward = Work(5 * d + 6 * n, 11 * d * n, d * n, indices=1)
    return Job(Side("ours", selective_scan, inputs), loop, activations, peers, forward, backward)


def attention(shape: Shape, make: Maker, mamba: ModuleType | None) -> Job:
    """In shifted windows.

    A logit gets scale and bias (one multiply-add), is compared with the maximum, which is subtracted, exponentiated and
    summed. Going back it is computed again, multiplied by its gradient less its row's, and summed into the bias's
    gradient. There are two matrix products forward, five backward.
    """
    c, w, shift, heads = shape.dim, shape.window, shape.window // 2, shape.heads
    inputs = {"qkv": make.picture(shape, 3 * c), "table": make.normal((2 * w - 1) ** 2, heads, scale=0.2)}
    index, mask = published.attention_constants(shape.side, shape.side, w, shift, like=inputs["qkv"])

    def ours(qkv: Tensor, table: Tensor) -> Tensor:
        return window_attention(qkv, table, heads, w, shift)

    def theirs(qkv: Tensor, table: Tensor) -> Tensor:
        return published.attend(qkv, table, index, mask.to(qkv.dtype), w, shift)

    logits, product = w**2 * heads, 2 * w**2 * c
    forward, backward = Work(4 * c, 4 * logits, logits, 2 * product), Work(7 * c, 6 * logits, logits, 5 * product)
    return _compare(ours, theirs, inputs, {"qkv"}, forward, backward)


def routing(shape: Shape, make: Maker, mamba: ModuleType | None) -> Job:
    """From scores to prompt and order. The peer also moves the scan's input and result, as our scan does itself.

    A score gets its noise and is compared. Going back the noise is drawn again, the softmax and its gradient computed,
    and there are two matrix products with the prompts' table.
    """
    b, length, t, n = shape.batch, shape.length, shape.classes, shape.states
    theirs = {"scores": make.normal(b, length, t, scale=2), "table": make.normal(t, n)}
    inputs = theirs | {"positions": torch.arange(b, device=make.device)}
    theirs |= {"rows": make.normal(b, length, shape.hidden), "result": make.normal(b, length, shape.dim)}

    def ours(scores: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        noise = KeyedNoise(NoiseKey(0, positions), 0)
        index = choose_class(scores, noise)
        return class_prompt(scores, table, index, noise), class_order(index, t)[0]

    def expected(scores: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return published.route(scores, table, gumbel(NoiseKey(0, positions), 0, tuple(scores.shape), scores.device))

    forward = Work(t + n, (GUMBEL + 2) * t, 2 * t, indices=2)
    backward = Work(2 * t + n, (GUMBEL + 6) * t, 3 * t, 4 * n * t, indices=1)
    peers = [Side("published", published.route_and_move, theirs)]
    return Job(Side("ours", ours, inputs), expected, frozenset({"scores", "positions"}), peers, forward, backward)


def depthwise(k: int, shape: Shape, make: Maker, mamba: ModuleType | None) -> Job:
    """The feed-forward block's convolution (5×5), or the state space module's (3×3).

    k² multiply-adds, and going back three times as many: the result again, and the gradients of x and of the weight.
    """
    gated = k == 5 and shape.gated
    d = shape.hidden // 2 if gated else shape.hidden
    epilogue: Epilogue = "sigmoid_gate" if k == 3 else "norm_gate" if gated else "gelu_residual"
    inputs = {"x": make.picture(shape, d), "weight": make.normal(d, 1, k, k, scale=1 / k), "bias": make.normal(d)}
    inputs |= make.norm(d) | {"gate": make.picture(shape, d)} if gated else {}

    def ours(gamma: Tensor | None = None, beta: Tensor | None = None, **rest: Any) -> Tensor:
        norm = None if gamma is None or beta is None else (gamma, beta)
        return depthwise_conv(epilogue=epilogue, norm=norm, **rest)

    after = {"sigmoid_gate": SIGMOID, "gelu_residual": GELU, "norm_gate": NORM}[epilogue]
    forward = Work((3 if gated else 2) * d, (k * k + after + 1) * d, 0 if gated else d)
    backward = Work((5 if gated else 3) * d, (3 * k * k + after + 4) * d, 0 if gated else d)
    theirs = functools.partial(published.convolve, epilogue=epilogue)
    return _compare(ours, theirs, inputs, {"x", "gate"}, forward, backward)


def layer(which: str, shape: Shape, make: Maker, mamba: ModuleType | None) -> Job:
    """A linear layer with what surrounds it: in front of the attention, or one of the feed-forward block's.

    One matrix product, and going back two. That of a GELU needs the product again or its result, which is left out.
    """
    c, hidden = shape.dim, shape.hidden
    second = hidden // 2 if shape.gated else hidden
    depth, width = {"qkv": (c, 3 * c), "gelu": (c, hidden), "add": (second, c)}[which]
    inputs = {"x": make.picture(shape, depth), "weight": make.normal(width, depth, scale=depth**-0.5)}
    inputs |= {"bias": make.normal(width)} | (make.norm(depth) if which != "add" else {})
    if which == "add":
        inputs |= {"residual": make.picture(shape, c), "skip": make.picture(shape, c), "skip_scale": make.normal(c)}

    def ours(gamma: Tensor | None = None, beta: Tensor | None = None, **rest: Any) -> Tensor:
        norm = None if gamma is None or beta is None else (gamma, beta)
        return linear(norm=norm, gelu=which == "gelu", **rest)

    front, after, around = {"qkv": (NORM, 0, 0), "gelu": (NORM, GELU, 0), "add": (0, 2, 2)}[which]
    floats, special = front * depth + after * width, width * (which == "gelu")
    forward = Work(depth + (1 + around) * width, floats, special, 2 * depth * width)
    backward = Work(2 * depth + (1 + around) * width, 2 * floats, special, 4 * depth * width)
    theirs = functools.partial(published.linear, gelu=which == "gelu")
    return _compare(ours, theirs, inputs, {"x", "residual", "skip"}, forward, backward)


OPERATORS: dict[str, Callable[[Shape, Maker, ModuleType | None], Job]] = {
    "scan": scan,
    "attention": attention,
    "routing": routing,
    "depthwise-5x5": functools.partial(depthwise, 5),
    "depthwise-3x3": functools.partial(depthwise, 3),
    "linear-qkv": functools.partial(layer, "qkv"),
    "linear-gelu": functools.partial(layer, "gelu"),
    "linear-add": functools.partial(layer, "add"),
}


def _compare(ours: Function, theirs: Function, inputs: Tensors, activations: set[str], *work: Work) -> Job:
    """A job whose peer takes the same inputs and is what ours must agree with."""
    peers = [Side("published", theirs, inputs)]
    return Job(Side("ours", ours, inputs), theirs, frozenset(activations), peers, *work)
