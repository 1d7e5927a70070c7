"""The selective scan on GPUs, parallel over samples, blocks of channels and segments of the sequence.

A state after a segment is e^(A ΣΔ) times the state before it, plus what the segment itself adds. So the forward pass
has three kernels: every segment's own addition and ΣΔ, all at once; a short loop over segments that carries the states;
every segment's outputs from its first state, all at once. The backward pass is the same three in reverse for the
gradient of the state, which obeys the mirrored recurrence r_t = e^(Δ_t A) (C_t gy_t + r_{t+1}). Its last kernel walks a
segment's chunks from the last to the first and recomputes each one's states from the one that the forward pass kept.

A channel's states lie in the registers of one lane, so that only the sums over channels, the gradients of B and C, need
traffic between lanes. States and sums are float32. There are no atomics: what blocks and segments share
goes into partial sums, added up in a fixed order, so two runs agree to the bit. docs/kernels.md counts it all.
"""

# mypy: disable-error-code="assignment, no-untyped-def"
# ruff: noqa: RUF005 (Triton's tuples grow by +)

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambair_ds.kernels.gpu import INTERPRETED
from mambair_ds.kernels.selective_scan.operator import make_operator

SEGMENT = 64
CHUNK = 16  # positions whose values of one state fit the registers of `backward_inputs`; half the lanes, for `_fold`
WIDTHS = {"forward": 64, "backward": 32}  # channels of a program, whose one warp loads B and C once for all of them
UNROLL = 4
WARPS = 1
REGISTERS = 208
"""A thread's at most in `backward_inputs`: a multiprocessor then has room for a warp more, and nothing is spilled."""


def _sum_lanes_in_ptx() -> str:
    """Eight sums over a warp by its matrix units, which cut their inputs to TF32's ten bits behind the point.

    A product's right side has row c and column g in lane 4 g + c. The first four products (16x8 times 8x8) have two
    values there, in rows 0-3 and 4-7; their left side's ones put the sum over c of values[i] into row i of the result.
    Of that, lane 4 g + c gets row g, columns 2 c and 2 c + 1, as a left side has them: rows g and g + 8, column c. So
    the fifth product (16x4 times 4x8) sums over c again, the even columns in its rows 0-7, the odd ones in 8-15; the
    ones on its right side put both into one pair of columns, which one lane of each four gets. What the first products
    have in rows 8-15 is not read.
    """
    names = [f"${i}" for i in range(25)]
    out, values, ones, group, sums = names[:4], names[4:12], names[12:20], names[20], names[21:]
    lines = [".reg .b32 v<8>, e<8>, s, none<8>; .reg .f32 p<4>;", f"mov.b32 s, {group};"]
    lines += [f"mov.b32 v{i}, {values[i]}; mov.b32 e{i}, {ones[i]};" for i in range(8)]
    lines += [f"mov.f32 p{i}, 0f00000000;" for i in range(4)]
    for i in range(0, 8, 2):
        lines.append(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
            f"{{p0, p1, p2, p3}}, {{e{i}, none{i}, e{i + 1}, none{i + 1}}}, {{v{i}, v{i + 1}}}, {{p0, p1, p2, p3}};"
        )
    lines.append(".reg .b32 q<2>; mov.b32 q0, p0; mov.b32 q1, p1;")
    lines.append("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32")
    lines.append(f"{{{', '.join(out)}}}, {{q0, q1}}, {{s}}, {{{', '.join(sums)}}};")
    return "{" + "\n".join(lines) + "}"


SUM_LANES = tl.constexpr(_sum_lanes_in_ptx())
SUM_LANES_OPERANDS = tl.constexpr(",".join(["=f"] * 4 + ["f"] * 21))

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
def _row(order, first, k, channels: tl.constexpr, d, inside, FULL: tl.constexpr):
    """Where in its sample channels d of position first + k of the sequence lie."""
    if order is None:
        at = first * channels + k * channels + d
    else:
        token = tl.load(order + first + k) if FULL else tl.load(order + first + k, mask=inside, other=0)
        at = token.to(tl.int32) * channels + d
    return at


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
    """What this program works on: a segment, a sample, a block of channels and which of them exist.

    Those that do not are others once more: loads need no mask, only stores do.
    """
    blocks: tl.constexpr = (channels + WIDTH - 1) // WIDTH
    d = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1).to(tl.int64), d % channels, d < channels


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
    N: tl.constexpr, PAD: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """B and C + prompt of a segment as float32 in the sequence's order, 0 behind its end.

    `rows` is (B, segments, SEGMENT, B and C, PAD), for kernels that take one position after the other, and `columns`
    (B, segments * chunks of a segment, N, B and C, CHUNK), for one that takes one state after the other; not written
    if None. `sample_B` and `row_B` are the distances of B's samples and rows.
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
    rows += (place + k) * (2 * PAD) + s
    b *= LN2
    tl.store(rows, b)
    tl.store(rows + PAD, c)
    if columns is not None:
        columns += ((place + k) // CHUNK * N + s) * (2 * CHUNK) + k % CHUNK
        tl.store(columns, b, mask=s < N)
        tl.store(columns + CHUNK, c, mask=s < N)


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
def segment_ends(
    x, delta, A, rows, bias, order, ends, sums, length, segments,
    channels: tl.constexpr, N: tl.constexpr, PAD: tl.constexpr, SEGMENT: tl.constexpr, UNROLL: tl.constexpr,
    WIDTH: tl.constexpr, SOFTPLUS: tl.constexpr, NARROW: tl.constexpr, FULL: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What every segment adds to the state, `ends` (B, segments, N, D), and its ΣΔ, `sums` (B, segments, D).

    x is u; or, if REVERSE, the gradient of y, and the state is r at the segment's first position.
    """
    segment, batch, d, in_d = _place(channels, WIDTH)
    rates = _load_states(A + d, channels, N)
    shift = _load(bias + d) * LOG2E
    start = segment.to(tl.int32) * SEGMENT
    groups = tl.cdiv(tl.minimum(length - start, SEGMENT), UNROLL)
    last = start + (groups - 1) * UNROLL
    x += batch * length * channels
    delta += batch * length * channels
    if order is not None:
        order += batch * length
    rows += batch * segments * SEGMENT * (2 * PAD)
    way: tl.constexpr = -1 if REVERSE else 1
    step: tl.constexpr = way * UNROLL
    k0: tl.constexpr = UNROLL - 1 if REVERSE else 0
    side: tl.constexpr = PAD if REVERSE else 0
    state = ()
    for _s in tl.static_range(N):
        state = state + (tl.zeros((WIDTH,), tl.float32),)
    total = tl.zeros((WIDTH,), tl.float32)
    first = last if REVERSE else start
    tokens = _tokens(order, first, channels, length, UNROLL, FULL)
    steps, inputs = _rows(delta, tokens, d, UNROLL), _rows(x, tokens, d, UNROLL)
    second = tl.minimum(tl.maximum(first + step, start), last)
    tokens = _tokens(order, second, channels, length, UNROLL, FULL)
    for _ in range(groups):
        third = tl.minimum(tl.maximum(second + step, start), last)
        next_steps, next_inputs = _rows(delta, tokens, d, UNROLL), _rows(x, tokens, d, UNROLL)
        tokens = _tokens(order, third, channels, length, UNROLL, FULL)
        for k in tl.static_range(k0, UNROLL - 1 - k0 + way, way):
            numbers = _numbers(rows + ((first + k) * (2 * PAD) + side), N)
            dt = _step(steps[k].to(tl.float32) * LOG2E + shift, SOFTPLUS, NARROW)
            value = inputs[k].to(tl.float32)
            if not FULL:
                dt = tl.where(first + k < length, dt, 0.0)
            total += dt
            new = ()
            if REVERSE:
                for s in tl.static_range(N):
                    new = new + (tl.exp2(dt * rates[s]) * (state[s] + value * numbers[s]),)
            else:
                drive = dt * value
                for s in tl.static_range(N):
                    new = new + (tl.exp2(dt * rates[s]) * state[s] + drive * numbers[s],)
            state = new
        steps, inputs, first, second = next_steps, next_inputs, second, third
    place = batch * segments + segment
    for s in tl.static_range(N):
        tl.store(ends + (place * N + s) * channels + d, state[s], mask=in_d)
    tl.store(sums + place * channels + d, total, mask=in_d)


@triton.jit
def forward_outputs(
    u, delta, A, rows, D, bias, order, carried, states, y, length, segments,
    channels: tl.constexpr, N: tl.constexpr, PAD: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr,
    UNROLL: tl.constexpr, WIDTH: tl.constexpr, SOFTPLUS: tl.constexpr, NARROW: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """y, (B, L, D), from the state that enters each segment; and `states`, that which enters each chunk."""
    segment, batch, d, in_d = _place(channels, WIDTH)
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
    rows += batch * segments * SEGMENT * (2 * PAD)
    states += (batch * tl.cdiv(length, CHUNK) + start // CHUNK) * N * channels
    tokens = _tokens(order, start, channels, length, UNROLL, FULL)
    steps, inputs = _rows(delta, tokens, d, UNROLL), _rows(u, tokens, d, UNROLL)
    later = _tokens(order, tl.minimum(start + UNROLL, end - UNROLL), channels, length, UNROLL, FULL)
    for chunk in range(start, end, CHUNK):
        for s in tl.static_range(N):
            tl.store(states + d + s * channels, state[s], mask=in_d)
        states += N * channels
        for first in range(chunk, chunk + CHUNK, UNROLL):
            second = tl.minimum(first + UNROLL, end - UNROLL)
            next_steps, next_inputs = _rows(delta, later, d, UNROLL), _rows(u, later, d, UNROLL)
            third = _tokens(order, tl.minimum(second + UNROLL, end - UNROLL), channels, length, UNROLL, FULL)
            for k in tl.static_range(UNROLL):
                numbers = _numbers(rows + (first + k) * (2 * PAD), 2 * PAD)
                dt = _step(steps[k].to(tl.float32) * LOG2E + shift, SOFTPLUS, NARROW)
                value = inputs[k].to(tl.float32)
                drive = dt * value
                out = direct * value
                new = ()
                for s in tl.static_range(N):
                    h = tl.exp2(dt * rates[s]) * state[s] + drive * numbers[s]
                    out += h * numbers[PAD + s]
                    new = new + (h,)
                state = new
                inside = in_d if FULL else in_d & (first + k < length)
                tl.store(y + (tokens[k] + d), out.to(y.dtype.element_ty), mask=inside)
            steps, inputs, tokens, later = next_steps, next_inputs, later, third


@triton.jit
def carry(
    A, ends, sums, channels, segments,
    N: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn every segment's own addition, `ends` (B, segments, N, D), in place into the state that enters it."""
    s, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    in_d = d < channels
    rates = tl.load(A + s * channels + d, mask=in_d)
    state = tl.zeros((WIDTH,), tl.float32)
    for i in tl.range(0, segments, num_stages=4):
        place = batch * segments + ((segments - 1 - i) if REVERSE else i)
        end = tl.load(ends + (place * N + s) * channels + d, mask=in_d)
        total = tl.load(sums + place * channels + d, mask=in_d)
        tl.store(ends + (place * N + s) * channels + d, state, mask=in_d)
        state = tl.exp2(total * rates) * state + end


@triton.jit
def _fold(x, y, lane, BIT: tl.constexpr):
    """Half a sum over lanes of two values at once: x's lies in the lanes without BIT, y's in those with it."""
    low = (lane & BIT) == 0
    return tl.where(low, x, y) + tl.gather(tl.where(low, y, x), lane ^ BIT, 0)


@triton.jit
def _sum_lanes(values, sums, ones, lane, GROUP: tl.constexpr, MATRIX: tl.constexpr):
    """Sums of eight values over a warp's 32 lanes: that of values[i] goes to lane 4 i + GROUP of sums[0] + sums[2].

    `sums` come from the calls for other groups, 0 at first; ones[i] is 1 in lanes 4 i to 4 i + 3 and 0 elsewhere.
    With MATRIX by the matrix units, in TF32: enough where sums end as 16-bit numbers. Without, in float32 by folding.
    """
    if MATRIX:
        return tl.inline_asm_elementwise(
            SUM_LANES, SUM_LANES_OPERANDS, values + ones + ((lane // 8 == GROUP).to(tl.float32),) + sums,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    for level in tl.static_range(3):
        folded = ()
        for j in tl.static_range(4 >> level):
            folded = folded + (_fold(values[2 * j], values[2 * j + 1], lane, 4 << level),)
        values = folded
    total = values[0]
    total += tl.gather(total, lane ^ 1, 0)
    total += tl.gather(total, lane ^ 2, 0)
    return tl.where(lane % 4 == GROUP, total, sums[0]), sums[1], sums[2], sums[3]


@triton.jit
def _load_turn(states, A, grad_states, part_A, at, in_d):
    """What `backward_inputs` needs of one state; h is 0 in channels that do not exist."""
    return tl.load(states + at, mask=in_d, other=0.0), _load(A + at), _load(grad_states + at), _load(part_A + at)


@triton.jit
def backward_inputs(
    grad_y, u, delta, A, columns, D, bias, order, states, grad_states,
    grad_u, grad_delta, part_A, part_BC, part_D, part_bias, length, segments,
    channels: tl.constexpr, N: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
    SOFTPLUS: tl.constexpr, NARROW: tl.constexpr, FULL: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """All gradients from the state that enters each chunk and the r that enters each segment.

    One state after the other: a chunk's values of it lie in registers, so the pass back through them needs no memory.
    What passes from chunk to chunk, r and the gradient of A, goes through memory, from a lane to itself. Writes the
    gradients of u and delta, and partial sums: `part_A` (B, segments, N, D), `part_D` and `part_bias` (B, segments, D),
    `part_BC` (blocks of channels, B, segments * chunks of a segment, N, B and C, CHUNK).
    """
    segment, batch, d, in_d = _place(channels, WIDTH)
    lane = tl.arange(0, WIDTH)
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
    columns += (place * SEGMENT + chunks * CHUNK) * (2 * N)
    states += (batch * tl.cdiv(length, CHUNK) + start // CHUNK + chunks) * N * channels
    grad_states += place * N * channels
    part_A += place * N * channels
    row = (block.to(tl.int64) * tl.num_programs(1) * segments + place) * SEGMENT + chunks * CHUNK
    part_BC += row * (2 * N)
    g_direct = tl.zeros((WIDTH,), tl.float32)
    g_shift = tl.zeros((WIDTH,), tl.float32)
    for i in range(chunks):
        first -= CHUNK
        states -= N * channels
        columns -= CHUNK * 2 * N
        part_BC -= CHUNK * 2 * N
        left = steps - (chunks - 1 - i) * CHUNK
        dt, drive, gy, g_dt, g_drive = (), (), (), (), ()
        for k in tl.static_range(CHUNK):
            inside = k < left
            at = _row(order, first, k, channels, d, inside, FULL)
            step = _step(_load_row(delta + at, inside, FULL) * LOG2E + shift, SOFTPLUS, NARROW)
            if not SOFTPLUS:
                step = tl.where(in_d, step, 0.0)
            dt = dt + (step,)
            drive = drive + (step * _load_row(u + at, inside, FULL),)
            gy = gy + (_load_row(grad_y + at, inside, FULL),)
            g_dt = g_dt + (tl.zeros((WIDTH,), tl.float32),)
            g_drive = g_drive + (tl.zeros((WIDTH,), tl.float32),)
        ahead = _load_turn(states, A, grad_states, part_A, d, in_d)
        for s in range(0, N):
            h, rate, r, g_rate = ahead  # loaded one turn early, as they come from afar
            following = tl.minimum(s + 1, N - 1) * channels + d
            ahead = _load_turn(states, A, grad_states, part_A, following, in_d)
            zero = tl.zeros((WIDTH,), tl.float32)
            sums = (zero, zero, zero, zero)
            b, c = _numbers(columns + s * (2 * CHUNK), CHUNK), _numbers(columns + s * (2 * CHUNK) + CHUNK, CHUNK)
            decays, kept, inner = (), (), ()
            for k in tl.static_range(CHUNK):
                decay = tl.exp2(dt[k] * rate)
                h *= decay
                decays = decays + (decay,)
                kept = kept + (h,)  # what the position keeps of the state before it
                h += drive[k] * b[k]
                inner = inner + (gy[k] * h,)
                if k % 8 == 7:
                    sums = _sum_lanes(inner, sums, ones, lane, k // 8, MATRIX)
                    inner = ()
            new_g_dt, new_g_drive, inner = (), (), ()
            for k in tl.static_range(CHUNK - 1, -1, -1):
                q = r + c[k] * gy[k]
                inner = (q * drive[k],) + inner
                r = q * decays[k]
                g = q * kept[k]  # the gradient of the exponent Δ·A
                g_rate += g * dt[k]
                new_g_dt = (g_dt[k] + g * rate,) + new_g_dt
                new_g_drive = (g_drive[k] + q * b[k],) + new_g_drive
                if k % 8 == 0:
                    sums = _sum_lanes(inner, sums, ones, lane, 2 + k // 8, MATRIX)
                    inner = ()
            g_dt, g_drive = new_g_dt, new_g_drive
            tl.store(part_BC + s * (2 * CHUNK) + lane, sums[0] + sums[2])
            tl.store(grad_states + d + s * channels, r, mask=in_d)
            tl.store(part_A + d + s * channels, g_rate, mask=in_d)
        places, of_u, of_delta = (), (), ()  # again all loads before the first store
        for k in tl.static_range(CHUNK):
            inside = k < left
            at = _row(order, first, k, channels, d, inside, FULL)
            x = _load_row(u + at, inside, FULL)
            g = g_dt[k] + g_drive[k] * x * LOG2E
            if SOFTPLUS:  # the derivative of Δ = log(1 + e^x) is e^(x - Δ)
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
    in_N = (s < N) & (k < CHUNK)
    lane = 4 * (k % 8) + k // 8  # where `_sum_lanes` puts the numbers of C; those of B lie two further
    g_B = tl.zeros((STATES, CHUNK), tl.float32)
    g_C = tl.zeros((STATES, CHUNK), tl.float32)
    for _ in range(blocks):
        g_B += tl.load(part_BC + s * (2 * CHUNK) + lane + 2, mask=in_N, other=0.0)
        g_C += tl.load(part_BC + s * (2 * CHUNK) + lane, mask=in_N, other=0.0)
        part_BC += tl.num_programs(1).to(tl.int64) * chunks * (2 * N * CHUNK)
    position = chunk * CHUNK + k
    inside = in_N & (position < length)
    token = batch * length + position
    if grad_prompt is not None:
        tl.store(grad_prompt + token * N + s, g_C.to(grad_prompt.dtype.element_ty), mask=inside)
    if order is not None:
        token = batch * length + tl.load(order + token, mask=position < length, other=0)
    tl.store(grad_B + token * N + s, (g_B * LN2).to(grad_B.dtype.element_ty), mask=inside)
    tl.store(grad_C + token * N + s, g_C.to(grad_C.dtype.element_ty), mask=inside)


def _pack(
    B: Tensor, C: Tensor, prompt: Tensor | None, order: Tensor | None, segments: int, *, columns: bool
) -> tuple[Tensor, Tensor | None]:
    """See `pack`."""
    batch, length, states = B.shape
    B, C = (x if x.stride(2) == 1 else x.contiguous() for x in (B, C))
    pad = _pad(states)
    by_row = B.new_empty(batch, segments, SEGMENT, 2, pad, dtype=torch.float32)
    by_column = (
        B.new_empty(batch, segments * SEGMENT // CHUNK, states, 2, CHUNK, dtype=torch.float32) if columns else None
    )
    pack[segments, batch](
        B, C, prompt, order, by_row, by_column, length, B.stride(0), B.stride(1), C.stride(0), C.stride(1),
        N=states, PAD=pad, SEGMENT=SEGMENT, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    return by_row, by_column


def _pad(states: int) -> int:
    return max(4, triton.next_power_of_2(states))


def _carry(rates: Tensor, ends: Tensor, sums: Tensor, reverse: bool) -> None:
    batch, segments, states, channels = ends.shape
    grid = (triton.cdiv(channels, 32), states, batch)
    carry[grid](rates, ends, sums, channels, segments, N=states, WIDTH=32, REVERSE=reverse, num_warps=WARPS)


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
    states = A.new_empty(batch, triton.cdiv(length, CHUNK), A.shape[1], channels)
    sums = A.new_empty(batch, segments, channels)
    y = torch.empty_like(u)
    width = WIDTHS["forward"]
    grid = (segments * triton.cdiv(channels, width), batch)
    sizes = {"length": length, "segments": segments, "channels": channels, "SEGMENT": SEGMENT, "UNROLL": UNROLL}
    sizes |= {"N": A.shape[1], "PAD": _pad(A.shape[1]), "WIDTH": width, "num_warps": WARPS}
    sizes |= {"SOFTPLUS": delta_softplus, "NARROW": u.element_size() == 2, "FULL": length % CHUNK == 0}
    with torch.cuda.device_of(u):
        rows, _ = _pack(B, C, prompt, order, segments, columns=False)
        segment_ends[grid](u, delta, rates, rows, delta_bias, order, entering, sums, REVERSE=False, **sizes)
        _carry(rates, entering, sums, reverse=False)
        forward_outputs[grid](u, delta, rates, rows, D, delta_bias, order, entering, states, y, CHUNK=CHUNK, **sizes)
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
    grad_states = A.new_empty(batch, segments, A.shape[1], channels)
    part_A = torch.zeros_like(grad_states)
    sums, part_D, part_bias = (A.new_empty(batch, segments, channels) for _ in range(3))
    width, blocks = WIDTHS["backward"], triton.cdiv(channels, WIDTHS["backward"])
    part_BC = A.new_empty(blocks, batch, segments * SEGMENT // CHUNK, A.shape[1], 2, CHUNK)
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    sizes = {"length": length, "segments": segments, "channels": channels, "N": A.shape[1], "SEGMENT": SEGMENT}
    sizes |= {"SOFTPLUS": delta_softplus, "NARROW": u.element_size() == 2, "FULL": length % CHUNK == 0}
    sizes |= {"num_warps": WARPS}
    with torch.cuda.device_of(u):
        rows, columns = _pack(B, C, prompt, order, segments, columns=True)
        grid = (segments * triton.cdiv(channels, WIDTHS["forward"]), batch)
        segment_ends[grid](
            grad_y, delta, rates, rows, delta_bias, order, grad_states, sums,
            PAD=_pad(A.shape[1]), UNROLL=UNROLL, WIDTH=WIDTHS["forward"], REVERSE=True, **sizes,
        )  # fmt: skip
        _carry(rates, grad_states, sums, reverse=True)
        backward_inputs[segments * blocks, batch](
            grad_y, u, delta, rates, columns, D, delta_bias, order, states, grad_states,
            grad_u, grad_delta, part_A, part_BC, part_D, part_bias,
            CHUNK=CHUNK, WIDTH=width, MATRIX=not INTERPRETED and u.element_size() == 2,
            maxnreg=REGISTERS, **sizes,
        )  # fmt: skip
        grad_B, grad_C, *grad_prompt = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (B, C, prompt) if x is not None
        )
        sum_blocks[triton.cdiv(length, CHUNK), batch](
            part_BC, order, grad_B, grad_C, grad_prompt[0] if grad_prompt else None, length,
            segments * SEGMENT // CHUNK, blocks, N=A.shape[1], CHUNK=CHUNK,
            STATES=triton.next_power_of_2(A.shape[1]), num_warps=WARPS,
        )  # fmt: skip
    grad_A, grad_D, grad_bias = (x.sum((0, 1)) for x in (part_A, part_D, part_bias))
    return [grad_u, grad_delta, (grad_A.T * LN2.value).contiguous(), grad_B, grad_C, grad_D, grad_bias, *grad_prompt]


_operator = make_operator("selective_scan_triton", forward, backward, CHUNK)


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
    if u.shape[1] * max(u.shape[2], 2 * _pad(A.shape[1])) >= 2**31:
        raise ValueError(f"selective_scan: a sample of shape {tuple(u.shape[1:])} has 2^31 numbers or more")
    return _operator(u, delta, A, B, C, D, delta_bias, prompt, order, delta_softplus)[0]
