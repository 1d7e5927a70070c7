"""The selective scan on GPUs, parallel over samples, blocks of channels and segments of the sequence.

A state after a segment is e^(A ΣΔ) times the state before it, plus what the segment itself adds. So the forward pass
has three kernels: every segment's own addition and ΣΔ, all at once; a short loop over segments that carries the states;
every segment's outputs from its first state, all at once. The backward pass is the same three in reverse for the
gradient of the state, which obeys the mirrored recurrence r_t = e^(Δ_t A) (C_t gy_t + r_{t+1}). Its last kernel walks a
segment's chunks from the last to the first and recomputes each one's states from the one that the forward pass kept.

A channel's states lie in the registers of one lane, so that only the sums over channels, the gradients of B and C, need
traffic between lanes. States and sums are float32. With 16-bit activations the matrix units take the products with B
and C and the sums. There are no atomics: what blocks and segments share goes into partial sums, added up in a fixed
order, so two runs agree to the bit. docs/kernels.md counts it all.
"""

# mypy: disable-error-code="assignment, no-untyped-def"
# ruff: noqa: RUF005 (Triton's tuples grow by +)

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambair_ds.kernels.gpu import INTERPRETED
from mambair_ds.kernels.selective_scan.matrix_units import (
    load_for_lanes,
    multiply,
    place_for_lanes,
    round_to_tf32,
    split_channels,
    sum_channels,
    sum_lanes,
)
from mambair_ds.kernels.selective_scan.operator import make_operator

SEGMENT = 64
CHUNK = 8  # positions whose values of one state fit the registers of `backward_inputs`, and `sum_lanes`
WIDTH = 64  # channels of a program, whose one warp loads B and C once for all of them
UNROLL = {"ends": 4, "outputs": 4, "long_outputs": 2}
"""Positions whose rows a walking kernel loads together, before it uses the last ones'; long are more than 8 states."""
TURNS = 2
"""Of the loop over states in `backward_inputs`, written out; one without the matrix units, for want of registers."""
WARPS = 1
REGISTERS = 232
"""A thread's at most in `backward_inputs`: a multiprocessor then has room for a warp more, and nothing is spilled."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _step(x, SOFTPLUS: tl.constexpr, NARROW: tl.constexpr):
    """Δ over log 2 = log2(1 + 2^x), of x in units of log 2: max(x, 0) + z p(z), z = 2^-|x|.

    The polynomial is within 4e-7 of its function, or 6e-5 where activations are NARROW: of 16 bits, good for 2e-3.
    """
    if SOFTPLUS:
        z = tl.exp2(-tl.abs(x))
        if NARROW:
            p = 0.0596515499 * z - 0.2271194458
            p = p * z + 0.4418988228
            p = p * z - 0.7169874310
            p = p * z + 1.4426132441
        else:
            p = -0.0123194735 * z + 0.0636078939
            p = p * z - 0.1553518772
            p = p * z + 0.2560097277
            p = p * z - 0.3533948362
            p = p * z + 0.4800637066
            p = p * z - 0.7213100791
            p = p * z + 1.4426947832
        x = p * z + tl.maximum(x, 0.0)
    return x


@triton.jit
def _load(pointer):
    return tl.load(pointer).to(tl.float32)


@triton.jit
def _load_row(pointer, inside, FULL: tl.constexpr):
    """A row of the sequence; 0 behind its end, which lies on a chunk's end if FULL."""
    return _load(pointer) if FULL else tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _numbers(pointer, COUNT: tl.constexpr):
    """COUNT numbers as a tuple, the same for all lanes, four by one load; reads up to a multiple of four."""
    numbers = ()
    for i in tl.static_range(0, COUNT, 4):
        even, odd = tl.split(tl.reshape(tl.load(pointer + i + tl.arange(0, 4)), (2, 2)))
        first, third = tl.split(tl.reshape(even, (1, 2)))
        second, fourth = tl.split(tl.reshape(odd, (1, 2)))
        numbers = numbers + (first, second, third, fourth)
    return numbers


@triton.jit
def _place(channels: tl.constexpr, WIDTH: tl.constexpr):
    """What this program works on: a segment, a sample, and places of channels, (32, 2), with what channels they take.

    Places behind the last channel take others once more: they compute the same, and may write it to where those do.
    """
    blocks: tl.constexpr = (channels + WIDTH - 1) // WIDTH
    d = tl.program_id(0) % blocks * WIDTH + 2 * tl.arange(0, 32)[:, None] + tl.arange(0, 2)[None, :]
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1).to(tl.int64), d, d % channels


@triton.jit
def _load_states(pointer, channels: tl.constexpr, N: tl.constexpr):
    """N numbers of every channel as a tuple; `channels` apart in memory."""
    values = ()
    for s in tl.static_range(N):
        values = values + (_load(pointer + s * channels),)
    return values


@triton.jit
def pack(
    B, C, prompt, order, rows, columns, length, sample_B, row_B, sample_C, row_C,
    N: tl.constexpr, PAD: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """B and C + prompt of a segment as float32 in the sequence's order, 0 behind its end.

    `rows` is (B, segments, SEGMENT, 3, PAD), for kernels that take one position after the other: B, C and zeros, first
    of the even states, then of the odd ones. `columns` is (B, segments * chunks of a segment, N, 4, CHUNK), for one
    that takes one state after the other: B with zeros at odd places, B with zeros at even ones, zeros, and C; not
    written if None. C is log 2 times itself, as steps and with them the states are in units of log 2; with MATRIX it is
    rounded to TF32. `sample_B` and `row_B` are the distances of B's samples and rows.
    """
    segment, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k, s = tl.arange(0, SEGMENT)[:, None], tl.arange(0, PAD)[None, :]
    position = segment * SEGMENT + k
    inside = (position < length) & (s < N)
    token = position.to(tl.int64)
    if order is not None:
        token = tl.load(order + batch * length + position, mask=position < length, other=0)
    b = tl.load(B + batch * sample_B + token * row_B + s, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(C + batch * sample_C + token * row_C + s, mask=inside, other=0.0).to(tl.float32)
    if prompt is not None:
        c += tl.load(prompt + (batch * length + position) * N + s, mask=inside, other=0.0).to(tl.float32)
    place = (batch * tl.num_programs(0) + segment) * SEGMENT
    c *= LN2
    if MATRIX:
        c = (round_to_tf32(c).to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    rows += (place + k) * (3 * PAD) + s % 2 * (PAD // 2) + s // 2
    tl.store(rows, b)
    tl.store(rows + PAD, c)
    tl.store(rows + 2 * PAD, tl.zeros_like(c))
    if columns is not None:
        columns += ((place + k) // CHUNK * N + s) * (4 * CHUNK) + k % CHUNK
        tl.store(columns, tl.where(k % 2 == 0, b, 0.0), mask=s < N)
        tl.store(columns + CHUNK, tl.where(k % 2 == 0, 0.0, b), mask=s < N)
        tl.store(columns + 2 * CHUNK, tl.zeros_like(b), mask=s < N)
        tl.store(columns + 3 * CHUNK, c, mask=s < N)


@triton.jit
def _tokens(order, first, channels: tl.constexpr, length, COUNT: tl.constexpr, FULL: tl.constexpr):
    """Where in their sample the rows of COUNT positions of the sequence lie; behind its end, the last one's."""
    tokens = ()
    for k in tl.static_range(COUNT):
        position = first + k if FULL else tl.minimum(first + k, length - 1)
        tokens = tokens + ((position if order is None else tl.load(order + position).to(tl.int32)) * channels,)
    return tokens


@triton.jit
def _rows(pointer, tokens, d, COUNT: tl.constexpr):
    """The rows at `tokens`, as they are: conversions wait for the loads."""
    rows = ()
    for k in tl.static_range(COUNT):
        rows = rows + (tl.load(pointer + (tokens[k] + d)),)
    return rows


@triton.jit
def _times(x, numbers, N: tl.constexpr, PAD: tl.constexpr, MATRIX: tl.constexpr):
    """x, (32, 2), times every number of a row, as a tuple by state."""
    products = ()
    if MATRIX:
        none = tl.zeros((32,), tl.float32)
        left, numbers = split_channels(round_to_tf32(x)), load_for_lanes(numbers, N // 2)
        for i in tl.static_range(N // 2):
            a, b, c, d = multiply(left, (numbers[i],), (none, none, none, none), 4)
            products = products + (tl.join(a, c), tl.join(b, d))
    else:
        numbers = _numbers(numbers, PAD)
        for s in tl.static_range(N):
            products = products + (x * numbers[s % 2 * (PAD // 2) + s // 2],)
    return products


@triton.jit
def segment_ends(
    x, delta, A, rows, bias, order, ends, sums, length, segments,
    channels: tl.constexpr, N: tl.constexpr, PAD: tl.constexpr, SEGMENT: tl.constexpr, UNROLL: tl.constexpr,
    WIDTH: tl.constexpr, SOFTPLUS: tl.constexpr, NARROW: tl.constexpr, FULL: tl.constexpr, REVERSE: tl.constexpr,
    MATRIX: tl.constexpr,
):  # fmt: skip
    """What every segment adds to the state, `ends` (B, segments, N, 1, D), and its ΣΔ, `sums` (B, segments, D).

    x is u; or, if REVERSE, the gradient of y, and the state is r at the segment's first position. There a position's
    decay follows what it adds, so the loop has it one position later; and `ends` is (B, segments, N, 2, D up to a
    multiple of WIDTH), as `backward_inputs` wants it: with zeros beside.
    """
    SPAN: tl.constexpr = (channels + WIDTH - 1) // WIDTH * WIDTH
    segment, batch, own, d = _place(channels, WIDTH)
    rates = _load_states(A + d, channels, N)
    shift = _load(bias + d) * LOG2E
    start = segment.to(tl.int32) * SEGMENT
    groups = tl.cdiv(tl.minimum(length - start, SEGMENT), UNROLL)
    last = start + (groups - 1) * UNROLL
    x += batch * length * channels
    delta += batch * length * channels
    if order is not None:
        order += batch * length
    way: tl.constexpr = -1 if REVERSE else 1
    step: tl.constexpr = way * UNROLL
    k0: tl.constexpr = UNROLL - 1 if REVERSE else 0
    rows += batch * segments * SEGMENT * (3 * PAD)
    side: tl.constexpr = PAD if REVERSE else 0
    numbers = rows + place_for_lanes(side, side + PAD // 2, 2 * PAD, MATRIX)
    state = ()
    for _s in tl.static_range(N):
        state = state + (tl.zeros_like(shift),)
    total = tl.zeros_like(shift)
    decaying = tl.zeros_like(shift)
    first = last if REVERSE else start
    tokens = _tokens(order, first, channels, length, UNROLL, FULL)
    steps, inputs = _rows(delta, tokens, d, UNROLL), _rows(x, tokens, d, UNROLL)
    second = tl.minimum(tl.maximum(first + step, start), last)
    tokens = _tokens(order, second, channels, length, UNROLL, FULL)
    for _ in range(groups):
        third = tl.minimum(tl.maximum(second + step, start), last)
        next_steps, next_inputs = _rows(delta, tokens, d, UNROLL), _rows(x, tokens, d, UNROLL)
        tokens = _tokens(order, third, channels, length, UNROLL, FULL)
        group = numbers + first * (3 * PAD)
        for k in tl.static_range(k0, UNROLL - 1 - k0 + way, way):
            dt = _step(steps[k].to(tl.float32) * LOG2E + shift, SOFTPLUS, NARROW)
            value = inputs[k].to(tl.float32)
            if not FULL:
                dt = tl.where(first + k < length, dt, 0.0)
            total += dt
            if not REVERSE:
                value *= dt
                decaying = dt
            products = _times(value, group + k * (3 * PAD), N, PAD, MATRIX)
            new = ()
            for s in tl.static_range(N):
                new = new + (tl.exp2(decaying * rates[s]) * state[s] + products[s],)
            state = new
            decaying = dt
        steps, inputs, first, second = next_steps, next_inputs, second, third
    place = batch * segments + segment
    for s in tl.static_range(N):
        if REVERSE:
            to = ends + (place * N + s) * (2 * SPAN) + own
            tl.store(to, tl.exp2(decaying * rates[s]) * state[s])
            tl.store(to + SPAN, tl.zeros_like(total))
        else:
            tl.store(ends + (place * N + s) * channels + d, state[s])
    tl.store(sums + place * channels + d, total)


@triton.jit
def forward_outputs(
    u, delta, A, rows, D, bias, order, carried, states, y, length, segments,
    channels: tl.constexpr, N: tl.constexpr, PAD: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr,
    UNROLL: tl.constexpr, WIDTH: tl.constexpr, SOFTPLUS: tl.constexpr, NARROW: tl.constexpr, FULL: tl.constexpr,
    MATRIX: tl.constexpr,
):  # fmt: skip
    """y, (B, L, D), from the state that enters each segment; and `states`, that which enters each chunk.

    With MATRIX sums over states, too, are the matrix units', two states of two channels at a time, and two positions
    share a result: the first has the right side's columns 0 to 3, the second 4 to 7. Lane 4 g + t gets four neighboring
    channels of the first, if t < 2, or the second.
    """
    segment, batch, _, d = _place(channels, WIDTH)
    rates = _load_states(A + d, channels, N)
    shift = _load(bias + d) * LOG2E
    direct = _load(D + d)
    state = _load_states(carried + (batch * segments + segment) * N * channels + d, channels, N)
    start = segment.to(tl.int32) * SEGMENT
    end = tl.minimum(start + SEGMENT, tl.cdiv(length, CHUNK) * CHUNK)
    u += batch * length * channels
    delta += batch * length * channels
    y += batch * length * channels
    if order is not None:
        order += batch * length
    rows += batch * segments * SEGMENT * (3 * PAD)
    numbers = rows + place_for_lanes(0, PAD // 2, 2 * PAD, MATRIX)
    lane = tl.arange(0, 32)
    early, late = lane // 4 == lane % 4, lane // 4 == lane % 4 + 4
    of_early, of_late = rows + tl.where(early, PAD, 2 * PAD), rows + tl.where(late, PAD, 2 * PAD)
    four = (tl.program_id(0) % tl.cdiv(channels, WIDTH) * WIDTH + lane // 4 * 8 + lane % 2 * 4) % channels
    states += (batch * tl.cdiv(length, CHUNK) + start // CHUNK) * N * channels
    tokens = _tokens(order, start, channels, length, UNROLL, FULL)
    steps, inputs = _rows(delta, tokens, d, UNROLL), _rows(u, tokens, d, UNROLL)
    later = _tokens(order, tl.minimum(start + UNROLL, end - UNROLL), channels, length, UNROLL, FULL)
    for chunk in range(start, end, CHUNK):
        for s in tl.static_range(N):
            tl.store(states + d + s * channels, state[s].to(states.dtype.element_ty))
        states += N * channels
        for first in range(chunk, chunk + CHUNK, UNROLL):
            second = tl.minimum(first + UNROLL, end - UNROLL)
            next_steps, next_inputs = _rows(delta, later, d, UNROLL), _rows(u, later, d, UNROLL)
            third = _tokens(order, tl.minimum(second + UNROLL, end - UNROLL), channels, length, UNROLL, FULL)
            for k in tl.static_range(UNROLL):
                dt = _step(steps[k].to(tl.float32) * LOG2E + shift, SOFTPLUS, NARROW)
                value = inputs[k].to(tl.float32)
                products = _times(dt * value, numbers + first * (3 * PAD) + k * (3 * PAD), N, PAD, MATRIX)
                new = ()
                for s in tl.static_range(N):
                    new = new + (tl.exp2(dt * rates[s]) * state[s] + products[s],)
                state = new
                if MATRIX:
                    if k % 2 == 0:
                        none = tl.zeros((32,), tl.float32)
                        out = (none, none, none, none)
                    mine, of_mine = (early, of_early) if k % 2 == 0 else (late, of_late)
                    out = multiply(split_channels(direct * value), (mine.to(tl.float32),), out, 4)
                    row = load_for_lanes(of_mine + first * (3 * PAD) + k * (3 * PAD), N)
                    for i in tl.static_range(0, N, 2):  # first the even states' numbers, then the odd ones'
                        left = split_channels(state[2 * i % N + 2 * i // N])
                        left = left + split_channels(state[2 * i % N + 2 * i // N + 2])
                        out = multiply(left, (row[i], row[i + 1]), out, 8)
                    if k % 2 == 1:
                        second_half = lane % 4 // 2
                        to = tl.where(second_half == 1, tokens[k], tokens[k - 1]) + four
                        result = tl.reshape(tl.join(tl.join(out[0], out[1]), tl.join(out[2], out[3])), (32, 4))
                        to = y + (to[:, None] + tl.arange(0, 4)[None, :])
                        inside = None if FULL else (first + k - 1 + second_half < length)[:, None]
                        tl.store(to, result.to(y.dtype.element_ty), mask=inside)
                else:
                    row = _numbers(rows + (first + k) * (3 * PAD) + PAD, PAD)
                    out = direct * value
                    for s in tl.static_range(N):
                        out += state[s] * row[s % 2 * (PAD // 2) + s // 2]
                    inside = None if FULL else first + k < length
                    tl.store(y + (tokens[k] + d), out.to(y.dtype.element_ty), mask=inside)
            steps, inputs, tokens, later = next_steps, next_inputs, later, third


@triton.jit
def carry(
    A, ends, sums, channels, segments, row,
    N: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn every segment's own addition, in place, into the state that enters it.

    `ends` is (B, segments, N, 1 or 2, D or more); only the first of two is read, and `row` is from a state to the next.
    """
    s, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    in_d = d < channels
    rates = tl.load(A + s * channels + d, mask=in_d)
    state = tl.zeros((WIDTH,), tl.float32)
    for i in tl.range(0, segments, num_stages=4):
        place = batch * segments + ((segments - 1 - i) if REVERSE else i)
        end = tl.load(ends + (place * N + s) * row + d, mask=in_d)
        total = tl.load(sums + place * channels + d, mask=in_d)
        tl.store(ends + (place * N + s) * row + d, state, mask=in_d)
        state = tl.exp2(total * rates) * state + end


@triton.jit
def _load_turn(states, A, passed, s, channels: tl.constexpr, SPAN: tl.constexpr, own, d, in_d):
    """What `backward_inputs` needs of one state; h is 0 in channels that do not exist."""
    h = tl.load(states + (s * channels + d), mask=in_d, other=0.0).to(tl.float32)
    passed += s * (2 * SPAN) + own
    return h, _load(A + (s * channels + d)), _load(passed), _load(passed + SPAN)


@triton.jit
def _add_products(sums, values, column, CHUNK: tl.constexpr, MATRIX: tl.constexpr):
    """sums + values, (32, 2), times a state's B, as a tuple by position: two at a time with MATRIX."""
    added = ()
    if MATRIX:
        numbers = load_for_lanes(column, CHUNK)
        for k in tl.static_range(0, CHUNK, 2):
            a, c = tl.split(sums[k])
            b, d = tl.split(sums[k + 1])
            left = split_channels(values[k]) + split_channels(values[k + 1])
            a, b, c, d = multiply(left, (numbers[k], numbers[k + 1]), (a, b, c, d), 8)
            added = added + (tl.join(a, c), tl.join(b, d))
    else:
        numbers = _numbers(column, 2 * CHUNK)
        for k in tl.static_range(CHUNK):
            added = added + (sums[k] + values[k] * numbers[k + k % 2 * CHUNK],)
    return added


@triton.jit
def backward_inputs(
    grad_y, u, delta, A, columns, D, bias, order, states, passed,
    grad_u, grad_delta, part_BC, part_D, part_bias, length, segments,
    channels: tl.constexpr, N: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
    SOFTPLUS: tl.constexpr, NARROW: tl.constexpr, FULL: tl.constexpr, MATRIX: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    """All gradients from the state that enters each chunk and the r that enters each segment.

    One state after the other: a chunk's values of it lie in registers, so the pass back through them needs no memory.
    What passes from chunk to chunk, r and the gradient of A, goes through `passed`, (B, segments, N, 2, D up to a
    multiple of WIDTH), from a lane to itself. Writes the gradients of u and delta, and partial sums: that of A in
    `passed`, `part_D` and `part_bias` (B, segments, D), and `part_BC` (blocks of channels, B, segments * chunks of a
    segment, N, CHUNK, C and B).
    """
    segment, batch, own, d = _place(channels, WIDTH)
    in_d = own < channels
    lane = tl.arange(0, 32)
    ones = ()
    for j in tl.static_range(8):
        ones = ones + ((lane // 4 == j).to(tl.float32),)
    shift = _load(bias + d) * LOG2E
    if SOFTPLUS:  # channels that do not exist stay out of the sums over channels: their Δ and states are 0
        shift = tl.where(in_d, shift, -1e30)
    direct = _load(D + d)
    start = segment * SEGMENT
    place = batch * segments + segment
    steps = (length - start).to(tl.int32)
    chunks = tl.cdiv(tl.minimum(steps, SEGMENT), CHUNK)
    block = tl.program_id(0) % ((channels + WIDTH - 1) // WIDTH)
    first = start + chunks * CHUNK
    grad_y += batch * length * channels
    u += batch * length * channels
    delta += batch * length * channels
    grad_u += batch * length * channels
    grad_delta += batch * length * channels
    if order is not None:
        order += batch * length
    columns += (place * SEGMENT + chunks * CHUNK) * (4 * N)
    mine = columns + place_for_lanes(0, CHUNK, 2 * CHUNK, MATRIX)
    states += (batch * tl.cdiv(length, CHUNK) + start // CHUNK + chunks) * N * channels
    SPAN: tl.constexpr = (channels + WIDTH - 1) // WIDTH * WIDTH
    passed += place * N * (2 * SPAN)
    row = (block.to(tl.int64) * tl.num_programs(1) * segments + place) * SEGMENT + chunks * CHUNK
    part_BC += row * (2 * N)
    zero = tl.zeros_like(shift)
    zeros = ()
    for _k in tl.static_range(CHUNK):
        zeros = zeros + (zero,)
    g_direct, g_shift = zero, zero
    later = _tokens(order, first - CHUNK, channels, length, CHUNK, FULL)
    for i in range(chunks):
        first -= CHUNK
        states -= N * channels
        columns -= CHUNK * 4 * N
        mine -= CHUNK * 4 * N
        part_BC -= CHUNK * 2 * N
        left = steps - (chunks - 1 - i) * CHUNK
        tokens = later
        dt, drive, gy = (), (), ()
        for k in tl.static_range(CHUNK):
            inside = k < left
            at = tokens[k] + d
            step = _step(_load_row(delta + at, inside, FULL) * LOG2E + shift, SOFTPLUS, NARROW)
            if not SOFTPLUS:
                step = tl.where(in_d, step, 0.0)
            dt = dt + (step,)
            step *= _load_row(u + at, inside, FULL)
            drive = drive + (round_to_tf32(step) if MATRIX else step,)
            gy = gy + (_load_row(grad_y + at, inside, FULL),)
        g_dt, g_drive = zeros, zeros
        ahead = _load_turn(states, A, passed, 0, channels, SPAN, own, d, in_d)
        for pair in range(0, N, TURNS):
            for turn in tl.static_range(TURNS):
                s = pair + turn
                h, rate, r, g_rate = ahead  # loaded one turn early, as they come from afar
                ahead = _load_turn(states, A, passed, tl.minimum(s + 1, N - 1), channels, SPAN, own, d, in_d)
                c = _numbers(columns + s * (4 * CHUNK) + 3 * CHUNK, CHUNK)
                none = tl.zeros((32,), tl.float32)
                sums = (none, none, none, none)
                added = _add_products(zeros, drive, mine + s * (4 * CHUNK), CHUNK, MATRIX)
                decays, before, inner = (), (), ()
                for k in tl.static_range(CHUNK):
                    decay = tl.exp2(dt[k] * rate)
                    decays, before = decays + (decay,), before + (h,)
                    h = decay * h + added[k]
                    inner = inner + (sum_channels(gy[k] * h),)
                sums = sum_lanes(inner, sums, ones, lane, 0, MATRIX)
                new_g_dt, qs, inner = (), (), ()
                for k in tl.static_range(CHUNK - 1, -1, -1):
                    q = r + c[k] * gy[k]
                    r = q * decays[k]
                    g = r * before[k]  # the gradient of the exponent Δ·A
                    g_rate += g * dt[k]
                    new_g_dt, qs = (g_dt[k] + g * rate,) + new_g_dt, (q,) + qs
                    inner = (sum_channels(q * drive[k]),) + inner
                sums = sum_lanes(inner, sums, ones, lane, 1, MATRIX)
                g_dt, g_drive = new_g_dt, _add_products(g_drive, qs, mine + s * (4 * CHUNK), CHUNK, MATRIX)
                to = part_BC + s * (2 * CHUNK) + lane // 4 * 2 + lane % 4
                tl.store(to, sums[0] + sums[2], mask=lane % 4 < 2)
                tl.store(passed + s * (2 * SPAN) + own, r)
                tl.store(passed + s * (2 * SPAN) + SPAN + own, g_rate)
        later = _tokens(order, tl.maximum(first - CHUNK, 0), channels, length, CHUNK, FULL)
        places, of_u, of_delta = (), (), ()  # again all loads before the first store
        for k in tl.static_range(CHUNK):
            inside = k < left
            at = tokens[k] + d
            x = _load_row(u + at, inside, FULL)
            g = g_dt[k] + g_drive[k] * x * LOG2E
            if SOFTPLUS:  # the derivative of Δ = log(1 + e^x) is e^(x - Δ), and 1 - e^-Δ, less exact where Δ is small
                if NARROW:
                    g -= g * tl.exp2(-dt[k])
                else:
                    g *= tl.exp2(_load_row(delta + at, inside, FULL) * LOG2E + shift - dt[k])
            places = places + (at,)
            of_u = of_u + (g_drive[k] * dt[k] + direct * gy[k],)
            of_delta = of_delta + (g,)
            g_direct += gy[k] * x
            g_shift += g
        for k in tl.static_range(CHUNK):
            inside = in_d if FULL else in_d & (k < left)
            tl.store(grad_delta + places[k], of_delta[k].to(grad_delta.dtype.element_ty), mask=inside)
            tl.store(grad_u + places[k], of_u[k].to(grad_u.dtype.element_ty), mask=inside)
    tl.store(part_D + place * channels + d, g_direct, mask=in_d)
    tl.store(part_bias + place * channels + d, g_shift, mask=in_d)


@triton.jit
def sum_blocks(
    part_BC, order, grad_B, grad_C, grad_prompt, length, chunks, blocks,
    N: tl.constexpr, CHUNK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """A chunk's gradients of B, C and the prompt, (B, L, N): the sums over blocks of channels, one after the other."""
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s, k = tl.arange(0, STATES)[:, None], tl.arange(0, CHUNK)[None, :]
    part_BC += (batch * chunks + chunk) * (2 * N * CHUNK)
    at = tl.arange(0, STATES * CHUNK * 2)
    sums = tl.zeros((STATES * CHUNK * 2,), tl.float32)
    for _ in range(blocks):
        sums += tl.load(part_BC + at, mask=at < N * CHUNK * 2, other=0.0)
        part_BC += tl.num_programs(1).to(tl.int64) * chunks * (2 * N * CHUNK)
    g_C, g_B = tl.split(tl.reshape(sums, (STATES, CHUNK, 2)))
    g_C *= LN2
    position = chunk * CHUNK + k
    inside = (s < N) & (position < length)
    token = batch * length + position
    if grad_prompt is not None:
        tl.store(grad_prompt + token * N + s, g_C.to(grad_prompt.dtype.element_ty), mask=inside)
    if order is not None:
        token = batch * length + tl.load(order + token, mask=position < length, other=0)
    tl.store(grad_B + token * N + s, g_B.to(grad_B.dtype.element_ty), mask=inside)
    tl.store(grad_C + token * N + s, g_C.to(grad_C.dtype.element_ty), mask=inside)


def _pack(
    B: Tensor, C: Tensor, prompt: Tensor | None, order: Tensor | None, segments: int, *, columns: bool, matrix: bool
) -> tuple[Tensor, Tensor | None]:
    """See `pack`."""
    batch, length, states = B.shape
    B, C = (x if x.stride(2) == 1 else x.contiguous() for x in (B, C))
    pad = _pad(states)
    by_row = B.new_empty(batch, segments, SEGMENT, 3, pad, dtype=torch.float32)
    by_column = (
        B.new_empty(batch, segments * SEGMENT // CHUNK, states, 4, CHUNK, dtype=torch.float32) if columns else None
    )
    pack[segments, batch](
        B, C, prompt, order, by_row, by_column, length, B.stride(0), B.stride(1), C.stride(0), C.stride(1),
        N=states, PAD=pad, SEGMENT=SEGMENT, CHUNK=CHUNK, MATRIX=matrix, num_warps=4,
    )  # fmt: skip
    return by_row, by_column


def unroll_outputs(states: int) -> int:
    """What `forward_outputs` has registers for."""
    return UNROLL["outputs" if states <= 8 else "long_outputs"]


def _pad(states: int) -> int:
    return max(4, triton.next_power_of_2(states))


def _suits_matrix_units(u: Tensor, states: int) -> bool:
    """Whether TF32 is enough, as results end as 16-bit numbers, and the kernels' tiles are full."""
    return not INTERPRETED and u.element_size() == 2 and u.shape[2] % 4 == 0 and states == _pad(states) >= 8


def _carry(rates: Tensor, ends: Tensor, sums: Tensor, reverse: bool) -> None:
    (batch, segments, states), channels = ends.shape[:3], rates.shape[1]
    grid = (triton.cdiv(channels, 32), states, batch)
    carry[grid](
        rates, ends, sums, channels, segments, ends.stride(2), N=states, WIDTH=32, REVERSE=reverse, num_warps=WARPS
    )


def kept_dtype(activations: torch.dtype) -> torch.dtype:
    """Of the states kept for the backward pass: rounded as the activations are, but with float32's range."""
    return torch.bfloat16 if activations.itemsize == 2 else torch.float32


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    prompt: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The forward pass; see `make_operator`."""
    u, delta, rates, D, delta_bias = (x.contiguous() for x in (u, delta, A.T, D, delta_bias))
    prompt, order = (None if x is None else x.contiguous() for x in (prompt, order))
    batch, length, channels = u.shape
    segments = triton.cdiv(length, SEGMENT)
    entering = A.new_empty(batch, segments, A.shape[1], channels)
    states = A.new_empty(batch, triton.cdiv(length, CHUNK), A.shape[1], channels, dtype=kept_dtype(u.dtype))
    sums = A.new_empty(batch, segments, channels)
    y = torch.empty_like(u)
    grid = (segments * triton.cdiv(channels, WIDTH), batch)
    sizes = {"length": length, "segments": segments, "channels": channels, "SEGMENT": SEGMENT}
    sizes |= {"N": A.shape[1], "PAD": _pad(A.shape[1]), "WIDTH": WIDTH, "num_warps": WARPS}
    sizes |= {"SOFTPLUS": delta_softplus, "NARROW": u.element_size() == 2, "FULL": length % CHUNK == 0}
    sizes["MATRIX"] = matrix = _suits_matrix_units(u, A.shape[1])
    with torch.cuda.device_of(u):
        rows, _ = _pack(B, C, prompt, order, segments, columns=False, matrix=matrix)
        segment_ends[grid](
            u, delta, rates, rows, delta_bias, order, entering, sums, UNROLL=UNROLL["ends"], REVERSE=False, **sizes
        )
        _carry(rates, entering, sums, reverse=False)
        forward_outputs[grid](
            u, delta, rates, rows, D, delta_bias, order, entering, states, y,
            CHUNK=CHUNK, UNROLL=unroll_outputs(A.shape[1]), **sizes,
        )  # fmt: skip
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
    prompt: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """The backward pass; see `make_operator`."""
    grad_y, u, delta, rates, D, delta_bias = (x.contiguous() for x in (grad_y, u, delta, A.T, D, delta_bias))
    prompt, order = (None if x is None else x.contiguous() for x in (prompt, order))
    batch, length, channels = u.shape
    segments = triton.cdiv(length, SEGMENT)
    blocks = triton.cdiv(channels, WIDTH)
    grid = (segments * blocks, batch)
    passed = A.new_empty(batch, segments, A.shape[1], 2, blocks * WIDTH)
    sums, part_D, part_bias = (A.new_empty(batch, segments, channels) for _ in range(3))
    part_BC = A.new_empty(blocks, batch, segments * SEGMENT // CHUNK, A.shape[1], CHUNK, 2)
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    sizes = {"length": length, "segments": segments, "channels": channels, "N": A.shape[1], "SEGMENT": SEGMENT}
    sizes |= {"SOFTPLUS": delta_softplus, "NARROW": u.element_size() == 2, "FULL": length % CHUNK == 0}
    matrix = _suits_matrix_units(u, A.shape[1])
    sizes |= {"MATRIX": matrix, "WIDTH": WIDTH, "num_warps": WARPS}
    with torch.cuda.device_of(u):
        rows, columns = _pack(B, C, prompt, order, segments, columns=True, matrix=matrix)
        segment_ends[grid](
            grad_y, delta, rates, rows, delta_bias, order, passed, sums,
            PAD=_pad(A.shape[1]), UNROLL=UNROLL["ends"], REVERSE=True, **sizes,
        )  # fmt: skip
        _carry(rates, passed, sums, reverse=True)
        backward_inputs[grid](
            grad_y, u, delta, rates, columns, D, delta_bias, order, states, passed,
            grad_u, grad_delta, part_BC, part_D, part_bias,
            CHUNK=CHUNK, TURNS=TURNS if matrix else 1, maxnreg=REGISTERS if matrix else None, **sizes,
        )  # fmt: skip
        grad_B, grad_C, *grad_prompt = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (B, C, prompt) if x is not None
        )
        sum_blocks[triton.cdiv(length, CHUNK), batch](
            part_BC, order, grad_B, grad_C, grad_prompt[0] if grad_prompt else None, length,
            segments * SEGMENT // CHUNK, blocks, N=A.shape[1], CHUNK=CHUNK,
            STATES=triton.next_power_of_2(A.shape[1]), num_warps=WARPS,
        )  # fmt: skip
    grad_A, grad_D, grad_bias = (x.sum((0, 1)) for x in (passed[..., 1, :channels], part_D, part_bias))
    return [grad_u, grad_delta, (grad_A.T * LN2.value).contiguous(), grad_B, grad_C, grad_D, grad_bias, *grad_prompt]


_operator = make_operator("selective_scan_triton", forward, backward, CHUNK, kept_dtype)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    prompt: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """See `mambair_ds.kernels.selective_scan.selective_scan`; a sample of 2^31 numbers or more is a ValueError."""
    if u.shape[1] * max(u.shape[2], 3 * _pad(A.shape[1])) >= 2**31:
        raise ValueError(f"selective_scan: a sample of shape {tuple(u.shape[1:])} has 2^31 numbers or more")
    return _operator(u, delta, A, B, C, D, delta_bias, prompt, order, delta_softplus)[0]
