"""Nero's step in Triton: the device code of `gpu.py`. Importing this module imports Triton.

One launch serves tensors of one type with the same options. A program works on a *unit*, some neurons of one
tensor; `work` says which, and the tensor's line of `table` says where its memory lies and how it is laid out. The
equations stand in `archopt/optim/nero.py`, the layouts [batches][spread][rows][run] in `cpu.py`.

    entries     neurons of one entry each
    tiles       short rows, several side by side: read once and kept on chip until they are written
    long rows   read twice, mostly from cache the second time: five sums (of w, w^2, g, g^2 and w g) give the mean
                and the norm after the step
    columns     neurons side by side in memory (run = 1): as long rows
    runs        neurons of short pieces (run > 1): as long rows

Sums are float32 in a fixed order, so a step is the same to the bit every time; long ones end in float64. There are
no atomics: each unit writes its part of the turn and of the skipped rows, and `report` adds them up.
"""

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Columns of a line of the table.
WEIGHT = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG_SQ = tl.constexpr(2)
SCALE = tl.constexpr(3)
STEP = tl.constexpr(4)
TURN = tl.constexpr(5)
SKIPPED = tl.constexpr(6)
FAN_IN = tl.constexpr(7)
ROWS = tl.constexpr(8)  # of a batch
RUN = tl.constexpr(9)
NEURONS = tl.constexpr(10)
FIRST_UNIT = tl.constexpr(11)
UNITS = tl.constexpr(12)
NUMBER = tl.constexpr(13)  # of the tensor in its optimizer: a key for random numbers
COLUMNS = tl.constexpr(14)

# Bits of `flags`.
ZERO_MEAN = tl.constexpr(1)
UNIT_NORM = tl.constexpr(2)
MAXIMIZE = tl.constexpr(4)
TENSOR_RATE = tl.constexpr(8)

# Kinds of work. Memory of aligned rows begins at a multiple of VECTOR bytes, every row of them.
ENTRIES = tl.constexpr(0)
TILES = tl.constexpr(1)
ALIGNED_TILES = tl.constexpr(2)
LONG = tl.constexpr(3)
ALIGNED_LONG = tl.constexpr(4)
SIDE_BY_SIDE = tl.constexpr(5)
IN_RUNS = tl.constexpr(6)

VECTOR = tl.constexpr(16)
SPAN = tl.constexpr(32)  # chunks of a long row that are added up in float32 before the sum of sums in float64
CANCELLATION = tl.constexpr(0.25)  # a squared norm that is a smaller part of its terms is formed again
EPSILON = tl.constexpr(1.1920928955078125e-07)  # of float32
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _decide(square, old, v_ptr, at, inside, pace, beta, rest, lr):
    """v of neurons whose squared gradient norms are given; their stride, their turn, and who moves."""
    finite = square < float("inf")  # false for NaN too
    v = tl.where(finite, beta * old + rest * square, old)
    tl.store(v_ptr + at, v, mask=inside & finite)
    moves = inside & finite & (square > 0) & (v > 0) & (tl.zeros_like(square) + lr != 0)
    stride = tl.where(moves, pace / tl.sqrt_rn(tl.where(moves, v, 1.0)), 0.0)
    turn = stride * tl.sqrt_rn(tl.where(moves, square, 0.0))
    return stride, turn, moves, inside & (finite == 0)


@triton.jit
def _inverse(square, mean, fan_in, flags):
    """What a row is multiplied by. Where centring leaves no more than rounding does of a constant row: 1."""
    norm = tl.sqrt_rn(square)
    floor = tl.abs(mean) * (8 * EPSILON * tl.sqrt_rn(fan_in)) + TINY
    divides = (norm > floor) & ((flags & UNIT_NORM) != 0)
    return tl.where(divides, 1.0 / tl.where(divides, norm, 1.0), 1.0)


@triton.jit
def _put(to, value, mask, key, column, STOCHASTIC: tl.constexpr):
    """Stores weights, rounded to nearest or at random, without bias, by the bits that are cut off.

    Random bits: a key a row (philox), mixed with the column by two multiplications and three shifts. Philox for
    every entry would cost more than the memory that the step moves.
    """
    if STOCHASTIC:
        mixed = key ^ column.to(tl.uint32)
        mixed = (mixed ^ (mixed >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
        mixed = (mixed ^ (mixed >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
        noise = mixed >> 16
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + noise) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        nearest = value.to(tl.bfloat16)
        tl.store(to, tl.where(tl.abs(value) < float("inf"), rounded, nearest), mask=mask)
    else:
        tl.store(to, value.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _keys(number, step, neurons, STOCHASTIC: tl.constexpr):
    """A random key for each neuron at this step; 0 where none is needed."""
    if STOCHASTIC:
        seed = (number.to(tl.uint64) << 32) + step.to(tl.uint32).to(tl.uint64)
        keys = tl.randint(seed, neurons.to(tl.uint32)).to(tl.uint32, bitcast=True)
    else:
        keys = neurons.to(tl.uint32)
    return keys


@triton.jit
def _entries(w_ptr, g_ptr, v_ptr, first, count, pace, beta, rest, lr, sign, number, step,
             N: tl.constexpr, STOCHASTIC: tl.constexpr):  # fmt: skip
    """Biases, gains and the like: they are never projected."""
    at = first + tl.arange(0, N)
    inside = at < count
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    stride, turn, moves, skipped = _decide(g * g, v, v_ptr, at, inside, pace, beta, rest, lr)
    keys = _keys(number, step, at, STOCHASTIC)
    _put(w_ptr + at, w - (sign * stride) * g, moves, keys, at * 0, STOCHASTIC)
    return tl.sum(turn, 0), tl.sum(skipped.to(tl.int32), 0)


@triton.jit
def _tile(w_ptr, g_ptr, v_ptr, first, count, fan_in, pace, beta, rest, lr, sign, flags, number, step,
          R: tl.constexpr, C: tl.constexpr, STOCHASTIC: tl.constexpr):  # fmt: skip
    """R rows of up to C entries, on chip from the reading to the writing."""
    row = tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    inside = first + row < count
    mask = inside[:, None] & (column < fan_in)
    at = row[:, None] * fan_in + column
    w_ptr += first.to(tl.int64) * fan_in
    g_ptr += first.to(tl.int64) * fan_in
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + first + row, mask=inside, other=0.0)  # before any sum, which all have to wait for
    n = fan_in.to(tl.float32)
    square = tl.sum(g * g, 1)
    stride, turn, moves, skipped = _decide(square, v, v_ptr, first + row, inside, pace, beta, rest, lr)
    w = w - (sign * stride)[:, None] * g
    mean = tl.where((flags & ZERO_MEAN) != 0, tl.sum(w, 1) / n, 0.0)
    w = tl.where(mask, w - mean[:, None], 0.0)
    inverse = _inverse(tl.sum(w * w, 1), mean, n, flags)
    keys = _keys(number, step, first + row, STOCHASTIC)
    _put(w_ptr + at, w * inverse[:, None], mask & moves[:, None], keys[:, None], column, STOCHASTIC)
    return tl.sum(turn, 0), tl.sum(skipped.to(tl.int32), 0)


@triton.jit
def _places(row, entry, fan_in, rows, run, KIND: tl.constexpr):
    """Where the entries of neurons lie, from the beginning of their batch."""
    if KIND == SIDE_BY_SIDE:
        at = entry.to(tl.int64) * rows + row
    elif KIND == IN_RUNS:
        at = (entry // run).to(tl.int64) * rows * run + (row.to(tl.int64) * run + entry % run)
    else:
        at = row * 0 + entry
    return at


@triton.jit
def _long(w_ptr, g_ptr, v_ptr, first, fan_in, rows, run, pace, beta, rest, lr, sign, flags, number, step,
          R: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr, STOCHASTIC: tl.constexpr):  # fmt: skip
    """R neurons, C entries of each at a time; for long rows R = 1. They are read twice."""
    # `first` numbers a neuron over all batches; from here on rows are those of its batch.
    batch = first // rows
    row = first - batch * rows + tl.arange(0, R)
    inside = row < rows
    row = tl.where(inside, row, 0)
    if KIND == SIDE_BY_SIDE or KIND == IN_RUNS:
        begin = batch.to(tl.int64) * rows * fan_in
    else:
        begin = first.to(tl.int64) * fan_in
    w_ptr += begin
    g_ptr += begin
    column = tl.arange(0, C)[None, :]

    sum_w = tl.zeros((R,), tl.float64)
    sum_ww = tl.zeros((R,), tl.float64)
    sum_g = tl.zeros((R,), tl.float64)
    sum_gg = tl.zeros((R,), tl.float64)
    sum_wg = tl.zeros((R,), tl.float64)
    for begin_span in range(0, fan_in, SPAN * C):
        part_w = tl.zeros((R, C), tl.float32)
        part_ww = tl.zeros((R, C), tl.float32)
        part_g = tl.zeros((R, C), tl.float32)
        part_gg = tl.zeros((R, C), tl.float32)
        part_wg = tl.zeros((R, C), tl.float32)
        for k in range(begin_span, min(begin_span + SPAN * C, fan_in), C):
            mask = inside[:, None] & (k + column < fan_in)
            at = _places(row[:, None], k + column, fan_in, rows, run, KIND)
            w = tl.load(w_ptr + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            g = tl.load(g_ptr + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            part_w += w
            part_ww += w * w
            part_g += g
            part_gg += g * g
            part_wg += w * g
        sum_w += tl.sum(part_w, 1).to(tl.float64)
        sum_ww += tl.sum(part_ww, 1).to(tl.float64)
        sum_g += tl.sum(part_g, 1).to(tl.float64)
        sum_gg += tl.sum(part_gg, 1).to(tl.float64)
        sum_wg += tl.sum(part_wg, 1).to(tl.float64)

    neuron = batch * rows + row
    square = sum_gg.to(tl.float32)
    v = tl.load(v_ptr + neuron, mask=inside, other=0.0)
    stride, turn, moves, skipped = _decide(square, v, v_ptr, neuron, inside, pace, beta, rest, lr)
    stride = sign * stride
    t = stride.to(tl.float64)
    n = fan_in.to(tl.float32)
    mean = tl.where((flags & ZERO_MEAN) != 0, (sum_w - t * sum_g) / n, 0.0).to(tl.float32)
    exact_mean = mean.to(tl.float64)
    terms = sum_ww + t * (t * sum_gg)
    # The mean as it will be subtracted, which is rounded: hence not n mean^2 alone.
    square = (terms - 2 * t * sum_wg) - exact_mean * (2 * (sum_w - t * sum_g) - n * exact_mean)
    again = moves & ((square > CANCELLATION * terms) == 0)
    if tl.max(again.to(tl.int32), 0) > 0:
        # Somebody changed the weights so that they are far from balanced: from the moved row itself.
        total = tl.zeros((R, C), tl.float32)
        for k in range(0, fan_in, C):
            mask = inside[:, None] & (k + column < fan_in)
            at = _places(row[:, None], k + column, fan_in, rows, run, KIND)
            w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
            total += tl.where(mask, (w - stride[:, None] * g) - mean[:, None], 0.0)
        residue = tl.where((flags & ZERO_MEAN) != 0, tl.sum(total, 1) / n, 0.0)
        mean = tl.where(again, mean + residue, mean)
        total = tl.zeros((R, C), tl.float32)
        for k in range(0, fan_in, C):
            mask = inside[:, None] & (k + column < fan_in)
            at = _places(row[:, None], k + column, fan_in, rows, run, KIND)
            w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
            moved = tl.where(mask, (w - stride[:, None] * g) - mean[:, None], 0.0)
            total += moved * moved
        square = tl.where(again, tl.sum(total, 1).to(tl.float64), square)
    inverse = _inverse(tl.maximum(square, 0.0).to(tl.float32), mean, n, flags)

    keys = _keys(number, step, neuron, STOCHASTIC)
    for k in range(0, fan_in, C):
        mask = (inside & moves)[:, None] & (k + column < fan_in)
        at = _places(row[:, None], k + column, fan_in, rows, run, KIND)
        w = tl.load(w_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        moved = ((w - stride[:, None] * g) - mean[:, None]) * inverse[:, None]
        _put(w_ptr + at, moved, mask, keys[:, None], k + column, STOCHASTIC)
    return tl.sum(turn, 0), tl.sum(skipped.to(tl.int32), 0)


@triton.jit
def _correction(beta_log, step):
    """1 - beta^step from log(beta) <= 0: by its series where the difference would lose digits."""
    x = step * beta_log
    near = tl.maximum(x, -0.5)
    series = near * 0.0
    for k in tl.static_range(10, 0, -1):
        series = (1 + series) * (near / k)
    return tl.where(x > -0.5, -series, 1 - tl.exp(x))


@triton.jit(do_not_specialize=["flags", "base"])
def nero(table_ptr, work_ptr, turns_ptr, skipped_ptr, base, blocks, rate_ptr, lr, beta, rest, beta_log, flags,
         DTYPE: tl.constexpr, PER: tl.constexpr, KIND: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
         STOCHASTIC: tl.constexpr):  # fmt: skip
    """Unit `base` + the program's number: R neurons, C entries of each at a time; of tiles, so many blocks of them.

    lr, or *rate_ptr; beta, rest = 1 - beta and beta_log = log(beta), each as close as float32 can be. PER: entries
    of VECTOR bytes.
    """
    unit = base + tl.program_id(0)
    tensor = tl.load(work_ptr + 2 * unit)
    first = tl.load(work_ptr + 2 * unit + 1)
    line = table_ptr + tensor.to(tl.int64) * COLUMNS
    w_ptr = tl.load(line + WEIGHT).to(tl.pointer_type(DTYPE))
    g_ptr = tl.load(line + GRAD).to(tl.pointer_type(DTYPE))
    v_ptr = tl.load(line + EXP_AVG_SQ).to(tl.pointer_type(tl.float32))
    fan_in = tl.load(line + FAN_IN).to(tl.int32)
    count = tl.load(line + NEURONS).to(tl.int32)
    number = tl.load(line + NUMBER)
    scale = tl.load(tl.load(line + SCALE).to(tl.pointer_type(tl.float32)))
    step = tl.load(tl.load(line + STEP).to(tl.pointer_type(tl.float32))) + 1
    lr = tl.full((), lr, tl.float32)  # a plain float in the interpreter
    if (flags & TENSOR_RATE) != 0:
        lr = tl.load(rate_ptr)
    pace = lr * scale * tl.sqrt_rn(_correction(beta_log, step))
    sign = tl.where((flags & MAXIMIZE) != 0, -1.0, 1.0)
    if KIND == ALIGNED_TILES or KIND == ALIGNED_LONG:
        # The compiler is told what makes it right to load several entries at once.
        fan_in = (fan_in // PER) * PER
        w_ptr = tl.multiple_of(w_ptr, VECTOR)
        g_ptr = tl.multiple_of(g_ptr, VECTOR)

    if KIND == ENTRIES:
        turn, skipped = _entries(w_ptr, g_ptr, v_ptr, first, count, pace, beta, rest, lr, sign, number, step,
                                 R, STOCHASTIC)  # fmt: skip
    elif KIND == TILES or KIND == ALIGNED_TILES:
        turn = 0.0
        skipped = 0
        for block in range(blocks):
            more_turn, more_skipped = _tile(w_ptr, g_ptr, v_ptr, first + block * R, count, fan_in, pace, beta, rest,
                                            lr, sign, flags, number, step, R, C, STOCHASTIC)  # fmt: skip
            turn += more_turn
            skipped += more_skipped
    else:
        rows = tl.load(line + ROWS).to(tl.int32)
        run = tl.load(line + RUN).to(tl.int32)
        turn, skipped = _long(w_ptr, g_ptr, v_ptr, first, fan_in, rows, run, pace, beta, rest, lr, sign, flags,
                              number, step, R, C, KIND, STOCHASTIC)  # fmt: skip
    tl.store(turns_ptr + unit, turn)
    tl.store(skipped_ptr + unit, skipped)


@triton.jit
def report(table_ptr, turns_ptr, skipped_ptr, N: tl.constexpr):
    """For each tensor: its mean turn, its skipped rows, and its step count goes on by one."""
    line = table_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    first = tl.load(line + FIRST_UNIT)
    units = tl.load(line + UNITS)
    turn = tl.zeros((N,), tl.float32)
    count = tl.zeros((N,), tl.int32)
    for k in range(0, units, N):
        unit = k + tl.arange(0, N)
        turn += tl.load(turns_ptr + first + unit, mask=unit < units, other=0.0)
        count += tl.load(skipped_ptr + first + unit, mask=unit < units, other=0)
    turn_ptr = tl.load(line + TURN).to(tl.pointer_type(tl.float32))
    skipped_all = tl.load(line + SKIPPED).to(tl.pointer_type(tl.int32))
    step_ptr = tl.load(line + STEP).to(tl.pointer_type(tl.float32))
    neurons = tl.load(line + NEURONS).to(tl.float32)
    tl.store(turn_ptr, tl.sum(turn, 0) / neurons)
    tl.store(skipped_all, tl.load(skipped_all) + tl.sum(count, 0))
    tl.store(step_ptr, tl.load(step_ptr) + 1)
