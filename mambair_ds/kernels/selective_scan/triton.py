"""The selective scan on GPUs, parallel over samples, blocks of channels and chunks of the sequence.

A state after a chunk is e^(A ΣΔ) times the state before it, plus what the chunk itself adds. So the forward pass has
three kernels: every chunk's own addition and ΣΔ, all at once; a short loop over chunks that carries the states; every
chunk's outputs from its first state, all at once. The backward pass is the same three in reverse for the gradient of
the state, which obeys the mirrored recurrence r_t = e^(Δ_t A) (C_t gy_t + r_{t+1}); its last kernel recomputes a
chunk's states from the first one, which the forward pass kept.

Channels lie in the lanes and a channel's states in the registers of one lane, so that only the sums over channels, the
gradients of B and C, need traffic between lanes. States and sums are float32. There are no atomics: what blocks and
chunks share goes into partial sums, added up in a fixed order, so two runs agree to the bit.
"""

# mypy: disable-error-code="assignment, no-untyped-def"
# ruff: noqa: RUF005 (Triton's tuples grow by +)

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambair_ds.kernels.selective_scan.operator import make_operator

CHUNK = 12  # the most whose values fit the registers of `backward_inputs` on every supported GPU
WIDTH = 32
WARPS = 1

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _step(x, SOFTPLUS: tl.constexpr):
    """Δ; log(1 + z) = 2 artanh(z / (2 + z)), accurate for small z too."""
    if SOFTPLUS:
        z = tl.exp2(-tl.abs(x) * LOG2E)
        r = z / (2.0 + z)
        w = r * r
        p = 0.24409403628 * w + 0.21394267374
        p = p * w + 0.28620623406
        p = p * w + 0.39998694812
        p = p * w + 0.66666679253
        p = p * w + 2.0
        x = tl.maximum(x, 0.0) + r * p
    return x


@triton.jit
def _slope(x, SOFTPLUS: tl.constexpr):
    """Δ's derivative."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if SOFTPLUS:
        z = tl.exp2(-tl.abs(x) * LOG2E)
        slope = tl.where(x >= 0, 1.0, z) / (1.0 + z)
    return slope


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _place(channels, WIDTH: tl.constexpr):
    """What this program works on: a chunk, a sample, a block of channels and which of them exist."""
    blocks = tl.cdiv(channels, WIDTH)
    d = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1).to(tl.int64), d, d < channels


@triton.jit
def _rates(A, d, in_d, N: tl.constexpr, ROWS: tl.constexpr):
    """A's rows for the channels d as (ROWS, WIDTH), in units of log 2; states from N on are 0."""
    s = tl.arange(0, ROWS)
    mask = (s < N)[:, None] & in_d[None, :]
    return _load(A + d[None, :] * N + s[:, None], mask) * LOG2E, s, s < N, mask


@triton.jit
def forward_chunks(
    u, delta, A, B, bias, ends, sums, length, channels, chunks,
    N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """What every chunk adds to the state, `ends` (B, chunks, N, D), and its ΣΔ, `sums` (B, chunks, D)."""
    chunk, batch, d, in_d = _place(channels, WIDTH)
    rates, s, in_s, mask = _rates(A, d, in_d, N, ROWS)
    shift = _load(bias + d, in_d)
    state = tl.zeros((ROWS, WIDTH), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    start = chunk * CHUNK
    for t in range(start, tl.minimum(start + CHUNK, length)):
        row = batch * length + t
        dt = _step(_load(delta + row * channels + d, in_d) + shift, SOFTPLUS)
        drive = dt * _load(u + row * channels + d, in_d)
        b = _load(B + row * N + s, in_s)
        state = tl.exp2(dt[None, :] * rates) * state + drive[None, :] * b[:, None]
        total += dt
    place = batch * chunks + chunk
    tl.store(ends + (place * N + s[:, None]) * channels + d[None, :], state, mask=mask)
    tl.store(sums + place * channels + d, total, mask=in_d)


@triton.jit
def carry(
    A, ends, sums, channels, chunks,
    N: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn every chunk's own addition, `ends` (B, chunks, N, D), in place into the state that enters the chunk."""
    s, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    in_d = d < channels
    rates = _load(A + d * N + s, in_d) * LOG2E
    state = tl.zeros((WIDTH,), tl.float32)
    for i in tl.range(0, chunks, num_stages=4):
        place = batch * chunks + ((chunks - 1 - i) if REVERSE else i)
        end = _load(ends + (place * N + s) * channels + d, in_d)
        total = _load(sums + place * channels + d, in_d)
        tl.store(ends + (place * N + s) * channels + d, state, mask=in_d)
        state = tl.exp2(total * rates) * state + end


@triton.jit
def forward_outputs(
    u, delta, A, B, C, D, bias, states, y, length, channels, chunks,
    N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """y, (B, L, D), from the state that enters each chunk."""
    chunk, batch, d, in_d = _place(channels, WIDTH)
    rates, s, in_s, mask = _rates(A, d, in_d, N, ROWS)
    shift = _load(bias + d, in_d)
    direct = _load(D + d, in_d)
    place = batch * chunks + chunk
    state = _load(states + (place * N + s[:, None]) * channels + d[None, :], mask)
    start = chunk * CHUNK
    for t in range(start, tl.minimum(start + CHUNK, length)):
        row = batch * length + t
        dt = _step(_load(delta + row * channels + d, in_d) + shift, SOFTPLUS)
        x = _load(u + row * channels + d, in_d)
        b = _load(B + row * N + s, in_s)
        c = _load(C + row * N + s, in_s)
        state = tl.exp2(dt[None, :] * rates) * state + (dt * x)[None, :] * b[:, None]
        out = tl.sum(state * c[:, None], 0) + direct * x
        tl.store(y + row * channels + d, out.to(y.dtype.element_ty), mask=in_d)


@triton.jit
def backward_chunks(
    grad_y, delta, A, C, bias, ends, sums, length, channels, chunks,
    N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The mirror of `forward_chunks`: what every chunk adds to r at its first position, and its ΣΔ."""
    chunk, batch, d, in_d = _place(channels, WIDTH)
    rates, s, in_s, mask = _rates(A, d, in_d, N, ROWS)
    shift = _load(bias + d, in_d)
    state = tl.zeros((ROWS, WIDTH), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    start = chunk * CHUNK
    steps = tl.minimum(CHUNK, length - start)
    for i in range(0, steps):
        row = batch * length + start + steps - 1 - i
        dt = _step(_load(delta + row * channels + d, in_d) + shift, SOFTPLUS)
        gy = _load(grad_y + row * channels + d, in_d)
        c = _load(C + row * N + s, in_s)
        state = tl.exp2(dt[None, :] * rates) * (state + gy[None, :] * c[:, None])
        total += dt
    place = batch * chunks + chunk
    tl.store(ends + (place * N + s[:, None]) * channels + d[None, :], state, mask=mask)
    tl.store(sums + place * channels + d, total, mask=in_d)


@triton.jit
def backward_inputs(
    grad_y, u, delta, A, B, C, D, bias, states, grad_states,
    grad_u, grad_delta, part_A, part_B, part_C, part_D, part_bias, length, channels, chunks,
    N: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """All gradients from the state and the r that enter each chunk.

    One state after the other: its CHUNK values lie in registers, so the pass back through them needs no memory. Writes
    the gradients of u and delta, and partial sums: `part_A` (B, chunks, N, D), `part_D` and `part_bias` (B, chunks, D),
    `part_B` and `part_C` (blocks of channels, B, L, N).
    """
    chunk, batch, d, in_d = _place(channels, WIDTH)
    shift = _load(bias + d, in_d)
    direct = _load(D + d, in_d)
    start = batch * length + chunk * CHUNK
    sums = (tl.program_id(0) % tl.cdiv(channels, WIDTH)).to(tl.int64) * tl.num_programs(1) * length + start
    steps = length - chunk * CHUNK
    dt, drive, gy, g_dt, g_drive = (), (), (), (), ()
    for k in tl.static_range(CHUNK):
        inside = in_d & (k < steps)
        at = (start + k) * channels + d
        step = _step(_load(delta + at, inside) + shift, SOFTPLUS)
        step = tl.where(k < steps, step, 0.0)  # behind the end the state stays as it is
        dt = dt + (step,)
        drive = drive + (step * _load(u + at, inside),)
        gy = gy + (_load(grad_y + at, inside),)
        g_dt = g_dt + (tl.zeros((WIDTH,), tl.float32),)
        g_drive = g_drive + (tl.zeros((WIDTH,), tl.float32),)
    place = batch * chunks + chunk
    for s in range(0, N):
        rate = _load(A + d * N + s, in_d) * LOG2E
        h = _load(states + (place * N + s) * channels + d, in_d)
        r = _load(grad_states + (place * N + s) * channels + d, in_d)
        before, decays = (), ()
        for k in tl.static_range(CHUNK):
            before = before + (h,)
            decays = decays + (tl.exp2(dt[k] * rate),)
            h = decays[k] * h + drive[k] * _load(B + (start + k) * N + s, k < steps)
            inner = tl.sum(gy[k] * h, 0)
            tl.store(part_C + (sums + k) * N + s, inner, mask=k < steps)
        g_rate = tl.zeros((WIDTH,), tl.float32)
        new_g_dt, new_g_drive = (), ()
        for k in tl.static_range(CHUNK - 1, -1, -1):
            b = _load(B + (start + k) * N + s, k < steps)  # again: registers are scarcer than loads
            c = _load(C + (start + k) * N + s, k < steps)
            q = r + c * gy[k]
            inner = tl.sum(q * drive[k], 0)
            tl.store(part_B + (sums + k) * N + s, inner, mask=k < steps)
            r = q * decays[k]
            g = r * before[k]  # the gradient of the exponent Δ·A
            g_rate += g * dt[k]
            new_g_dt = (g_dt[k] + g * rate,) + new_g_dt
            new_g_drive = (g_drive[k] + q * b,) + new_g_drive
        g_dt, g_drive = new_g_dt, new_g_drive
        tl.store(part_A + (place * N + s) * channels + d, g_rate, mask=in_d)
    g_direct = tl.zeros((WIDTH,), tl.float32)
    g_shift = tl.zeros((WIDTH,), tl.float32)
    for k in tl.static_range(CHUNK):
        inside = in_d & (k < steps)
        at = (start + k) * channels + d
        x = _load(u + at, inside)
        slope = _slope(_load(delta + at, inside) + shift, SOFTPLUS)
        g_delta = tl.where(k < steps, (g_dt[k] * LN2 + g_drive[k] * x) * slope, 0.0)
        tl.store(grad_delta + at, g_delta.to(grad_delta.dtype.element_ty), mask=inside)
        tl.store(grad_u + at, (g_drive[k] * dt[k] + direct * gy[k]).to(grad_u.dtype.element_ty), mask=inside)
        g_direct += gy[k] * x
        g_shift += g_delta
    tl.store(part_D + place * channels + d, g_direct, mask=in_d)
    tl.store(part_bias + place * channels + d, g_shift, mask=in_d)


def _grid(u: Tensor) -> tuple[int, int]:
    batch, length, channels = u.shape
    return triton.cdiv(length, CHUNK) * triton.cdiv(channels, WIDTH), batch


def _carry(A: Tensor, ends: Tensor, sums: Tensor, reverse: bool) -> None:
    batch, chunks, states, channels = ends.shape
    grid = (triton.cdiv(channels, WIDTH), states, batch)
    carry[grid](A, ends, sums, channels, chunks, N=states, WIDTH=WIDTH, REVERSE=reverse, num_warps=WARPS)


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """The forward pass; see `make_operator`."""
    u, delta, A, B, C, D, delta_bias = (x.contiguous() for x in (u, delta, A, B, C, D, delta_bias))
    batch, length, channels = u.shape
    chunks = triton.cdiv(length, CHUNK)
    states = A.new_empty(batch, chunks, A.shape[1], channels)
    sums = A.new_empty(batch, chunks, channels)
    y = torch.empty_like(u)
    sizes = {"length": length, "channels": channels, "chunks": chunks}
    constants = {"N": A.shape[1], "CHUNK": CHUNK, "WIDTH": WIDTH, "SOFTPLUS": delta_softplus, "num_warps": WARPS}
    rows = triton.next_power_of_2(A.shape[1])
    with torch.cuda.device_of(u):
        forward_chunks[_grid(u)](u, delta, A, B, delta_bias, states, sums, **sizes, ROWS=rows, **constants)
        _carry(A, states, sums, reverse=False)
        forward_outputs[_grid(u)](u, delta, A, B, C, D, delta_bias, states, y, **sizes, ROWS=rows, **constants)
    return y, states


def backward(
    grad_y: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass; see `make_operator`."""
    grad_y, u, delta, A, B, C, D, delta_bias = (x.contiguous() for x in (grad_y, u, delta, A, B, C, D, delta_bias))
    batch, length, channels = u.shape
    chunks = states.shape[1]
    grad_states, part_A = torch.empty_like(states), torch.empty_like(states)
    sums, part_D, part_bias = (A.new_empty(batch, chunks, channels) for _ in range(3))
    part_B, part_C = (A.new_empty(triton.cdiv(channels, WIDTH), *B.shape) for _ in range(2))
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    sizes = {"length": length, "channels": channels, "chunks": chunks}
    constants = {"N": A.shape[1], "CHUNK": CHUNK, "WIDTH": WIDTH, "SOFTPLUS": delta_softplus, "num_warps": WARPS}
    rows = triton.next_power_of_2(A.shape[1])
    with torch.cuda.device_of(u):
        backward_chunks[_grid(u)](grad_y, delta, A, C, delta_bias, grad_states, sums, **sizes, ROWS=rows, **constants)
        _carry(A, grad_states, sums, reverse=True)
        backward_inputs[_grid(u)](
            grad_y, u, delta, A, B, C, D, delta_bias, states, grad_states,
            grad_u, grad_delta, part_A, part_B, part_C, part_D, part_bias, **sizes, **constants,
        )  # fmt: skip
    return (
        grad_u,
        grad_delta,
        part_A.sum((0, 1)).T.contiguous(),
        part_B.sum(0).to(B.dtype),
        part_C.sum(0).to(C.dtype),
        part_D.sum((0, 1)),
        part_bias.sum((0, 1)),
    )


_operator = make_operator("selective_scan_triton", forward, backward, CHUNK)


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, delta_softplus: bool
) -> Tensor:
    """See `mambair_ds.kernels.selective_scan.selective_scan`."""
    return _operator(u, delta, A, B, C, D, delta_bias, delta_softplus)[0]
