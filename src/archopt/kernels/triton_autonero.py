"""AutoNero's step in Triton. `gpu_autonero.py` prepares the tables and launches; `optim/autonero_rule.py` has the
equations.

A *table* has one line a tensor, of addresses and sizes. A *unit* is what one program works on: some rows, or some
entries of a vector. `paces` makes of the scalars of the step what all rows of a tensor share, and advances its step
count; where the step is not live the other kernels write nothing. Rows of up to the tile's width are on chip from
the reading to the writing; longer ones are read again, from the second cache. Sums have a fixed order: no atomics.
"""

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Columns of a line of the table.
WEIGHT = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
MOVEMENT = tl.constexpr(4)
RADIUS = tl.constexpr(5)
GROWS_TO = tl.constexpr(6)
STEP = tl.constexpr(7)
KIND = tl.constexpr(8)
ROWS = tl.constexpr(9)
FAN_IN = tl.constexpr(10)
GROUP = tl.constexpr(11)
HEAD = tl.constexpr(12)  # which of the reaches is its own
FIRST_UNIT = tl.constexpr(13)  # of `measure`
UNITS = tl.constexpr(14)
COLUMNS = tl.constexpr(15)

# Kinds of tensors, as in archopt/kernels/autonero.py.
ENTRIES = tl.constexpr(0)
PLAIN = tl.constexpr(2)
HIDDEN = tl.constexpr(3)

# Options of a group, float64: the first five as GroupOptions, then the logarithms of beta and beta2.
SIGN = tl.constexpr(2)
EXPONENT = tl.constexpr(3)
YOUNG = tl.constexpr(4)
LOG_BETA = tl.constexpr(5)
LOG_BETA2 = tl.constexpr(6)
OPTIONS = tl.constexpr(7)

# What all rows of a tensor share, float32.
LIVE = tl.constexpr(0)
FACTOR = tl.constexpr(1)  # of gradients: limit and sign
BETA = tl.constexpr(2)
REST = tl.constexpr(3)  # 1 - beta
BETA2 = tl.constexpr(4)
REST2 = tl.constexpr(5)
INVERSE = tl.constexpr(6)  # 1 / (1 - beta^t)
CORRECTION = tl.constexpr(7)  # 1 - beta2^t
ANGLE = tl.constexpr(8)
PER_THETA = tl.constexpr(9)  # 1 / theta
ROW_EXPONENT = tl.constexpr(10)
YOUNG_REACH = tl.constexpr(11)
PACE = tl.constexpr(12)

# ALIGNED, where it is not 0: rows of all tensors begin at multiples of VECTOR bytes, and their length is a multiple
# of so many entries (to `measure` a tensor is one row). The compiler is told, which makes it right to load several
# entries at once.
VECTOR = tl.constexpr(16)


@triton.jit
def _pointer(line, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column of the table."""
    found = tl.load(line + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        found = tl.multiple_of(found, VECTOR)
    return found


# -- measure -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["base"])
def measure(table_ptr, work_ptr, parts_ptr, base,
            W: tl.constexpr, D: tl.constexpr, N: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """||g||^2 and <g, d> of N entries."""
    unit = base + tl.program_id(0)
    tensor = tl.load(work_ptr + 2 * unit)
    first = tl.load(work_ptr + 2 * unit + 1).to(tl.int64) * N
    line = table_ptr + tensor.to(tl.int64) * COLUMNS
    count = tl.load(line + ROWS) * tl.load(line + FAN_IN)
    if ALIGNED:
        count = (count // ALIGNED) * ALIGNED
    g_ptr = _pointer(line, GRAD, W, ALIGNED) + first
    d_ptr = _pointer(line, MOVEMENT, D, ALIGNED) + first
    at = tl.arange(0, N)
    mask = at < count - first
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(parts_ptr + 2 * unit, tl.sum(g * g, 0))
    tl.store(parts_ptr + 2 * unit + 1, tl.sum(g * d, 0))


@triton.jit
def total(table_ptr, options_ptr, parts_ptr, sums_ptr, N: tl.constexpr):
    """The parts of a tensor, added up in float64; <g, d> with the sign of its group."""
    tensor = tl.program_id(0)
    line = table_ptr + tensor.to(tl.int64) * COLUMNS
    first = tl.load(line + FIRST_UNIT)
    units = tl.load(line + UNITS)
    square = tl.zeros((N,), tl.float64)
    product = tl.zeros((N,), tl.float64)
    for k in range(0, units, N):
        unit = k + tl.arange(0, N)
        mask = unit < units
        square += tl.load(parts_ptr + 2 * (first + unit), mask=mask, other=0.0).to(tl.float64)
        product += tl.load(parts_ptr + 2 * (first + unit) + 1, mask=mask, other=0.0).to(tl.float64)
    sign = tl.load(options_ptr + tl.load(line + GROUP) * OPTIONS + SIGN)
    tl.store(sums_ptr + 2 * tensor, tl.sum(square, 0))
    tl.store(sums_ptr + 2 * tensor + 1, sign * tl.sum(product, 0))


# -- what rows share ---------------------------------------------------------------------------------------


@triton.jit
def paces(table_ptr, options_ptr, scalars_ptr, paces_ptr):
    """The pace of a tensor at this step; its step count goes on by one, if the step is live."""
    tensor = tl.program_id(0)
    line = table_ptr + tensor.to(tl.int64) * COLUMNS
    group = tl.load(line + GROUP)
    option = options_ptr + group * OPTIONS
    scalar = scalars_ptr + group * 4
    f = tl.load(scalar)
    theta = tl.load(scalar + 1)
    angle = tl.load(scalar + 2)
    live = tl.load(scalar + 3)
    step_ptr = tl.load(line + STEP).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr) + live.to(tl.float32)
    tl.store(step_ptr, step)
    t = step.to(tl.float64)
    beta = tl.load(option)
    beta2 = tl.load(option + 1)
    young = tl.load(option + YOUNG).to(tl.float32)
    root = tl.sqrt_rn(tl.load(line + FAN_IN).to(tl.float32))
    correction = 1.0 - tl.exp(t * tl.load(option + LOG_BETA))
    correction2 = 1.0 - tl.exp(t * tl.load(option + LOG_BETA2))
    pace = paces_ptr + tensor * PACE
    tl.store(pace + LIVE, live.to(tl.float32))
    tl.store(pace + FACTOR, (f * tl.load(option + SIGN)).to(tl.float32))
    tl.store(pace + BETA, beta.to(tl.float32))
    tl.store(pace + REST, (1.0 - beta).to(tl.float32))
    tl.store(pace + BETA2, beta2.to(tl.float32))
    tl.store(pace + REST2, (1.0 - beta2).to(tl.float32))
    tl.store(pace + INVERSE, (1.0 / correction).to(tl.float32))
    tl.store(pace + CORRECTION, correction2.to(tl.float32))
    tl.store(pace + ANGLE, angle.to(tl.float32))
    tl.store(pace + PER_THETA, (1.0 / theta).to(tl.float32))
    tl.store(pace + ROW_EXPONENT, tl.load(option + EXPONENT).to(tl.float32))
    tl.store(pace + YOUNG_REACH, tl.where(young > 0, young, root))


# -- how rows move -----------------------------------------------------------------------------------------


@triton.jit
def _stride(s, length, radius, grows_to, kind, reach, young_reach, angle, per_length):
    """How far rows move along u, in units of u, and which do."""
    far = tl.where(grows_to > 0, young_reach, radius)
    far = tl.where(kind == PLAIN, reach, far)
    moves = (length > 0) & (s > 0) & (tl.zeros_like(s) + angle != 0)
    return tl.where(moves, angle * far / tl.where(moves, length, 1.0) * per_length, 0.0), moves


@triton.jit
def _radius(norm, along, s, radius, grows_to, moves, kind, exponent, angle, inverse):
    """The new radius, what a row is multiplied by after its step, and what it still grows to."""
    plain = (grows_to > 0) | (kind == PLAIN)
    scaled = radius * s
    outward = along * inverse / tl.where(scaled == 0, 1.0, scaled)
    grown = radius * tl.exp(-exponent * angle * outward)
    grown = tl.where(tl.zeros_like(s) + exponent == 0, radius, grown)
    new = tl.where(moves, tl.where(plain, norm, grown), radius)
    scale = tl.where(moves & (plain == 0), grown / tl.where(moves, norm, 1.0), 1.0)
    return new, scale, tl.where((grows_to > 0) & (new >= grows_to), 0.0, grows_to)


@triton.jit
def _rows(line, tensor, first, paces_ptr, reach_ptr, u_ptr, W: tl.constexpr, D: tl.constexpr,
          POLAR: tl.constexpr, ALIGNED: tl.constexpr, LONG: tl.constexpr,
          R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """The step of R rows: along u, their polar factors, or with m and v along m itself. Returns sum <gh, d>."""
    pace = paces_ptr + tensor * PACE
    kind = tl.load(line + KIND)
    count = tl.load(line + ROWS).to(tl.int32)
    fan_in = tl.load(line + FAN_IN).to(tl.int32)
    if ALIGNED:
        fan_in = (fan_in // ALIGNED) * ALIGNED
    begin = first.to(tl.int64) * fan_in
    row = tl.arange(0, R)
    inside = first + row < count
    column = tl.arange(0, C)[None, :]
    at = row[:, None] * fan_in + column
    w_ptr = _pointer(line, WEIGHT, W, ALIGNED) + begin
    m_ptr = _pointer(line, EXP_AVG, tl.float32, ALIGNED) + begin
    d_ptr = _pointer(line, MOVEMENT, D, ALIGNED) + begin
    v_ptr = tl.load(line + EXP_AVG_SQ).to(tl.pointer_type(tl.float32)) + first
    r_ptr = tl.load(line + RADIUS).to(tl.pointer_type(tl.float32)) + first
    grows_ptr = tl.load(line + GROWS_TO).to(tl.pointer_type(tl.float32)) + first
    v = tl.load(v_ptr + row, mask=inside, other=0.0)
    radius = tl.load(r_ptr + row, mask=inside, other=0.0)
    grows_to = tl.load(grows_ptr + row, mask=inside, other=0.0)
    # All scalars before the first sum, for which a program waits: else it would wait for each of them too.
    inverse = tl.load(pace + INVERSE)
    correction = tl.load(pace + CORRECTION)
    angle = tl.load(pace + ANGLE)
    per_theta = tl.load(pace + PER_THETA)
    exponent = tl.load(pace + ROW_EXPONENT)
    young_reach = tl.load(pace + YOUNG_REACH)
    reach = 0.0
    if POLAR:
        u_ptr += begin
    else:
        reach = tl.load(reach_ptr + tl.load(line + HEAD), mask=kind == PLAIN, other=0.0).to(tl.float32)
        g_ptr = _pointer(line, GRAD, W, ALIGNED) + begin
        factor = tl.load(pace + FACTOR)
        beta = tl.load(pace + BETA)
        rest = tl.load(pace + REST)
        beta2 = tl.load(pace + BETA2)
        rest2 = tl.load(pace + REST2)

    # The sums of rows; without polar factors m on the way.
    along = tl.zeros((R, C), tl.float32)
    square = tl.zeros((R, C), tl.float32)  # of u, or of the gradients
    if LONG:
        for k in range(0, fan_in, C):
            mask = inside[:, None] & (k + column < fan_in)
            w = tl.load(w_ptr + at + k, mask=mask, other=0.0).to(tl.float32)
            m = tl.load(m_ptr + at + k, mask=mask, other=0.0)
            if POLAR:
                u = tl.load(u_ptr + at + k, mask=mask, other=0.0)
                square += u * u
            else:
                g = tl.load(g_ptr + at + k, mask=mask, other=0.0).to(tl.float32) * factor
                m = m * beta + g * rest
                tl.store(m_ptr + at + k, m, mask=mask)
                square += g * g
            along += m * w
    else:
        mask = inside[:, None] & (column < fan_in)
        w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
        if POLAR:
            u = tl.load(u_ptr + at, mask=mask, other=0.0)
            square = u * u
        else:
            g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32) * factor
            m = m * beta + g * rest
            tl.store(m_ptr + at, m, mask=mask)
            square = g * g
            u = m
        along = m * w
    sum_square = tl.sum(square, 1)
    sum_along = tl.sum(along, 1)

    if POLAR:
        s = tl.sqrt_rn(v / correction)
        length = tl.sqrt_rn(sum_square)
        stride, moves = _stride(s, length, radius, grows_to, kind, reach, young_reach, angle, 1.0)
    else:
        v = v * beta2 + sum_square * rest2
        tl.store(v_ptr + row, v, mask=inside)
        s = tl.sqrt_rn(v / correction)
        stride, moves = _stride(s, s, radius, grows_to, kind, reach, young_reach, angle, inverse)

    moved = tl.zeros((R, C), tl.float32)
    if LONG:
        for k in range(0, fan_in, C):
            mask = inside[:, None] & (k + column < fan_in)
            w = tl.load(w_ptr + at + k, mask=mask, other=0.0).to(tl.float32)
            if POLAR:
                u = tl.load(u_ptr + at + k, mask=mask, other=0.0)
            else:
                u = tl.load(m_ptr + at + k, mask=mask, other=0.0)
            x = w - stride[:, None] * u
            moved += x * x
    else:
        x = w - stride[:, None] * u
        moved = x * x
    norm = tl.sqrt_rn(tl.sum(moved, 1))
    moves = moves & (norm > 0)
    new, scale, grows_to = _radius(
        norm, sum_along, s, radius, grows_to, moves, kind, exponent, angle, inverse
    )
    tl.store(r_ptr + row, new, mask=inside & moves)
    tl.store(grows_ptr + row, grows_to, mask=inside & moves)

    gain = tl.zeros((R, C), tl.float32)
    if LONG:
        for k in range(0, fan_in, C):
            mask = inside[:, None] & (k + column < fan_in)
            w = tl.load(w_ptr + at + k, mask=mask, other=0.0).to(tl.float32)
            m = tl.load(m_ptr + at + k, mask=mask, other=0.0)
            u = m
            if POLAR:
                u = tl.load(u_ptr + at + k, mask=mask, other=0.0)
            after = (w - stride[:, None] * u) * scale[:, None]
            d = tl.where(moves[:, None], (w - after) * per_theta, 0.0)
            gain += m * d
            tl.store(w_ptr + at + k, after.to(W), mask=mask & moves[:, None])
            tl.store(d_ptr + at + k, d.to(D), mask=mask)
    else:
        after = x * scale[:, None]
        d = tl.where(moves[:, None], (w - after) * per_theta, 0.0)
        gain = m * d
        tl.store(w_ptr + at, after.to(W), mask=mask & moves[:, None])
        tl.store(d_ptr + at, d.to(D), mask=mask)
    return tl.sum(tl.sum(gain, 1), 0) * inverse


@triton.jit
def _average(line, tensor, first, paces_ptr, W: tl.constexpr, ALIGNED: tl.constexpr,
             R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """m and v of R rows of hidden matrices."""
    pace = paces_ptr + tensor * PACE
    count = tl.load(line + ROWS).to(tl.int32)
    fan_in = tl.load(line + FAN_IN).to(tl.int32)
    if ALIGNED:
        fan_in = (fan_in // ALIGNED) * ALIGNED
    begin = first.to(tl.int64) * fan_in
    row = tl.arange(0, R)
    inside = first + row < count
    column = tl.arange(0, C)[None, :]
    at = row[:, None] * fan_in + column
    g_ptr = _pointer(line, GRAD, W, ALIGNED) + begin
    m_ptr = _pointer(line, EXP_AVG, tl.float32, ALIGNED) + begin
    v_ptr = tl.load(line + EXP_AVG_SQ).to(tl.pointer_type(tl.float32)) + first
    factor = tl.load(pace + FACTOR)
    beta = tl.load(pace + BETA)
    rest = tl.load(pace + REST)
    beta2 = tl.load(pace + BETA2)
    rest2 = tl.load(pace + REST2)
    v = tl.load(v_ptr + row, mask=inside, other=0.0)  # before the sum, for which the program waits
    square = tl.zeros((R, C), tl.float32)
    for k in range(0, fan_in, C):
        mask = inside[:, None] & (k + column < fan_in)
        g = tl.load(g_ptr + at + k, mask=mask, other=0.0).to(tl.float32) * factor
        m = tl.load(m_ptr + at + k, mask=mask, other=0.0)
        tl.store(m_ptr + at + k, m * beta + g * rest, mask=mask)
        square += g * g
    tl.store(v_ptr + row, v * beta2 + tl.sum(square, 1) * rest2, mask=inside)


@triton.jit
def _entries(line, tensor, first, paces_ptr, W: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """The step of N entries of a vector; returns sum <gh, d>."""
    pace = paces_ptr + tensor * PACE
    count = tl.load(line + ROWS).to(tl.int32)
    at = first + tl.arange(0, N)
    mask = at < count
    w_ptr = tl.load(line + WEIGHT).to(tl.pointer_type(W)) + at
    g_ptr = tl.load(line + GRAD).to(tl.pointer_type(W)) + at
    m_ptr = tl.load(line + EXP_AVG).to(tl.pointer_type(tl.float32)) + at
    v_ptr = tl.load(line + EXP_AVG_SQ).to(tl.pointer_type(tl.float32)) + at
    d_ptr = tl.load(line + MOVEMENT).to(tl.pointer_type(D)) + at
    w = tl.load(w_ptr, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr, mask=mask, other=0.0).to(tl.float32) * tl.load(pace + FACTOR)
    m = tl.load(m_ptr, mask=mask, other=0.0) * tl.load(pace + BETA) + g * tl.load(pace + REST)
    v = tl.load(v_ptr, mask=mask, other=0.0) * tl.load(pace + BETA2) + g * g * tl.load(pace + REST2)
    tl.store(m_ptr, m, mask=mask)
    tl.store(v_ptr, v, mask=mask)
    inverse = tl.load(pace + INVERSE)
    angle = tl.load(pace + ANGLE)
    s = tl.sqrt_rn(v / tl.load(pace + CORRECTION))
    moves = (s > 0) & (tl.zeros_like(s) + angle != 0)
    after = w - tl.where(moves, angle * (m * inverse) / tl.where(moves, s, 1.0), 0.0)
    d = (w - after) * tl.load(pace + PER_THETA)
    tl.store(w_ptr, after.to(W), mask=mask & moves)
    tl.store(d_ptr, d.to(D), mask=mask)
    return tl.sum(m * d, 0) * inverse


@triton.jit(do_not_specialize=["base"])
def average(table_ptr, work_ptr, paces_ptr, reach_ptr, expected_ptr, base, W: tl.constexpr, D: tl.constexpr,
            KIND_OF_WORK: tl.constexpr, ALIGNED: tl.constexpr, LONG: tl.constexpr,
            R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """m and v of R rows or entries, and their whole step where they are not hidden."""
    unit = base + tl.program_id(0)
    tensor = tl.load(work_ptr + 2 * unit)
    first = tl.load(work_ptr + 2 * unit + 1)
    line = table_ptr + tensor.to(tl.int64) * COLUMNS
    expected = tl.full((), 0.0, tl.float32)
    if tl.load(paces_ptr + tensor * PACE + LIVE) != 0:
        if KIND_OF_WORK == HIDDEN:
            _average(line, tensor, first, paces_ptr, W, ALIGNED, R, C)
        elif KIND_OF_WORK == ENTRIES:
            expected = _entries(line, tensor, first, paces_ptr, W, D, R)
        else:
            expected = _rows(line, tensor, first, paces_ptr, reach_ptr, reach_ptr, W, D, False, ALIGNED, LONG,
                             R, C)  # fmt: skip
    tl.store(expected_ptr + unit, expected)


@triton.jit(do_not_specialize=["position", "units"])
def turn(table_ptr, paces_ptr, u_ptr, expected_ptr, position, units, W: tl.constexpr, D: tl.constexpr,
         ALIGNED: tl.constexpr, LONG: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """The rest of the step of R rows of hidden matrices of one shape: so many `units` each, from `position` on."""
    number = tl.program_id(0) // units
    first = (tl.program_id(0) % units) * R
    tensor = position + number
    line = table_ptr + tensor.to(tl.int64) * COLUMNS
    before = number.to(tl.int64) * tl.load(line + ROWS) * tl.load(line + FAN_IN)
    if ALIGNED:
        before = (before // ALIGNED) * ALIGNED
    u_ptr += before
    expected = tl.full((), 0.0, tl.float32)
    if tl.load(paces_ptr + tensor * PACE + LIVE) != 0:
        expected = _rows(line, tensor, first, paces_ptr, paces_ptr, u_ptr, W, D, True, ALIGNED, LONG,
                         R, C)  # fmt: skip
    tl.store(expected_ptr + tl.program_id(0), expected)
