"""AGD's step in Triton: the device code of `gpu_agd.py`. Importing this module imports Triton.

`measure` sums the squares of the gradients, `finish` makes of them the norms of the parts and the terms of G, and
`step` moves the weights. One launch of each serves all tensors of one type. A program works on a *unit*, some
parts of one tensor and some entries of each; the unit's line of `work` says which, and the tensor's line of
`table` where its memory lies. Parts lie as [batches][spread][rows][run] (`cpu.py`).

    flat        a part in one piece, or a piece of it
    runs        one part that lies in runs, others between them (taps of channels-last convolutions)
    columns     parts that lie side by side, entry by entry (taps of convolutions, columns of a matrix)
    rows        short parts one after another (biases, gains, short rows)

A unit sums squares in float32, in a fixed order and without atomics. Where its sum is so small or so large that
squares vanish or overflow it sums again in float64, in which those of no float32 number do. Sums of units, norms
and G are float64, so that gradients of any finite size have their norm.
"""

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Columns of a line of the table.
WEIGHT = tl.constexpr(0)
GRAD = tl.constexpr(1)
KIND = tl.constexpr(2)
SPREAD = tl.constexpr(3)
ROWS = tl.constexpr(4)
RUN = tl.constexpr(5)
PARTS = tl.constexpr(6)
PIECES = tl.constexpr(7)  # units that share a part
FIRST_PART = tl.constexpr(8)
FIRST_SLOT = tl.constexpr(9)
REACH = tl.constexpr(10)  # a float64
RATE = tl.constexpr(11)  # which of the rates multiplies its pace; -1 for none
COLUMNS = tl.constexpr(12)

# Columns of a line of the work.
TENSOR = tl.constexpr(0)
PART = tl.constexpr(1)
FIRST = tl.constexpr(2)  # entry of the part
PIECE = tl.constexpr(3)  # number of the unit among those of its parts
UNIT = tl.constexpr(4)

# Kinds of work. Of aligned kinds all runs begin at multiples of VECTOR bytes.
FLAT = tl.constexpr(0)
ALIGNED_FLAT = tl.constexpr(1)
IN_RUNS = tl.constexpr(2)
ALIGNED_RUNS = tl.constexpr(3)
SIDE_BY_SIDE = tl.constexpr(4)
SHORT_ROWS = tl.constexpr(5)

VECTOR = tl.constexpr(16)
N = tl.constexpr(2048)  # entries that a program holds: of one part,
DEEP = tl.constexpr(128)  # or so many of each of
WIDE = tl.constexpr(16)  # parts side by side,
MANY = tl.constexpr(64)  # or of so many short parts
SHORT = tl.constexpr(32)  # each
SPAN = tl.constexpr(16384)  # entries of a unit: of one part,
DEEP_SPAN = tl.constexpr(1024)  # or of each of some parts side by side
FEW = tl.constexpr(8)  # pieces of a part that one thread adds up

# A float32 sum between these has lost nothing that matters: what vanishes of a square is below 1.2e-38.
LEAST_SQUARE = tl.constexpr(1e-25)
MOST_SQUARE = tl.constexpr(1e37)
# A factor between these, distance / ||g||, is a normal float32 with room on both sides.
LEAST_FACTOR = tl.constexpr(4.7e-38)
MOST_FACTOR = tl.constexpr(2.1e37)


@triton.jit
def _unsound(square, inside):
    """Whether any of these float32 sums has to be formed again; NaN is none between the bounds either."""
    sound = (square >= LEAST_SQUARE) & (square <= MOST_SQUARE)
    return tl.max((inside & (sound == 0)).to(tl.int32), 0) > 0


# -- places ------------------------------------------------------------------------------------------------


@triton.jit
def _begin(part, spread, rows, run, PER: tl.constexpr):
    """The first entry of a part; of an aligned one the compiler is told that it is a multiple of PER."""
    begin = (part // rows).to(tl.int64) * spread * rows * run + (part % rows).to(tl.int64) * run
    return (begin // PER) * PER


@triton.jit
def _place(entry, rows, run, RUNS: tl.constexpr, PER: tl.constexpr):
    """Where entries of a part lie, from its first one."""
    at = entry
    if RUNS:
        at = (entry // run).to(tl.int64) * rows * run + entry % run
        if PER > 1:
            at = tl.max_contiguous(tl.multiple_of(at, PER), PER)
    return at


# -- squares -----------------------------------------------------------------------------------------------


@triton.jit
def _squares(g_ptr, first, end, rows, run, RUNS: tl.constexpr, PER: tl.constexpr, EXACT: tl.constexpr):
    """The sum of squares of entries of one part."""
    total = tl.zeros((N,), EXACT)
    for k in range(first, end, N):
        entry = k + tl.arange(0, N)
        at = _place(entry, rows, run, RUNS, PER)
        g = tl.load(g_ptr + at, mask=entry < end, other=0.0).to(tl.float32).to(EXACT)
        total += g * g
    return tl.sum(total, 0)


@triton.jit
def _squares_side_by_side(g_ptr, row, first, end, rows, EXACT: tl.constexpr):
    """The sums of squares of entries of parts that lie side by side."""
    total = tl.zeros((DEEP, WIDE), EXACT)
    for k in range(first, end, DEEP):
        entry = (k + tl.arange(0, DEEP))[:, None]
        at = entry.to(tl.int64) * rows + row[None, :]
        mask = (entry < end) & (row < rows)[None, :]
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32).to(EXACT)
        total += g * g
    return tl.sum(total, 0)


@triton.jit
def _squares_of_rows(g_ptr, inside, run, EXACT: tl.constexpr):
    """The sums of squares of short parts."""
    total = tl.zeros((MANY, SHORT), EXACT)
    for k in range(0, run, SHORT):
        entry = (k + tl.arange(0, SHORT))[None, :]
        at = tl.arange(0, MANY)[:, None] * run + entry
        g = tl.load(g_ptr + at, mask=inside[:, None] & (entry < run), other=0.0).to(tl.float32).to(EXACT)
        total += g * g
    return tl.sum(total, 1)


@triton.jit
def _measure_piece(g_ptr, slot_ptr, part, first, spread, rows, run,
                   RUNS: tl.constexpr, PER: tl.constexpr):  # fmt: skip
    first = (first // N) * N
    end = (tl.minimum(spread * run, first + SPAN) // PER) * PER
    g_ptr += _begin(part, spread, rows, run, PER)
    square = _squares(g_ptr, first, end, rows, run, RUNS, PER, tl.float32)
    exact = square.to(tl.float64)
    if ((square >= LEAST_SQUARE) & (square <= MOST_SQUARE)) == 0:
        exact = _squares(g_ptr, first, end, rows, run, RUNS, PER, tl.float64)
    tl.store(slot_ptr, exact)


@triton.jit
def _measure_side_by_side(g_ptr, slot_ptr, pieces, part, first, spread, rows):
    row = part % rows + tl.arange(0, WIDE)
    end = tl.minimum(spread, first + DEEP_SPAN)
    g_ptr += _begin(part - part % rows, spread, rows, 1, 1)
    square = _squares_side_by_side(g_ptr, row, first, end, rows, tl.float32)
    exact = square.to(tl.float64)
    if _unsound(square, row < rows):
        exact = _squares_side_by_side(g_ptr, row, first, end, rows, tl.float64)
    tl.store(slot_ptr + tl.arange(0, WIDE) * pieces, exact, mask=row < rows)


@triton.jit
def _measure_rows(g_ptr, slot_ptr, pieces, part, parts, run):
    inside = part + tl.arange(0, MANY) < parts
    g_ptr += part.to(tl.int64) * run
    square = _squares_of_rows(g_ptr, inside, run, tl.float32)
    exact = square.to(tl.float64)
    if _unsound(square, inside):
        exact = _squares_of_rows(g_ptr, inside, run, tl.float64)
    tl.store(slot_ptr + tl.arange(0, MANY) * pieces, exact, mask=inside)


@triton.jit
def measure(table_ptr, work_ptr, slots_ptr, DTYPE: tl.constexpr, PER: tl.constexpr):
    """The sums of squares that a unit has of its parts; slots_ptr: float64, [parts][pieces] of each tensor. PER:
    entries of VECTOR bytes."""
    unit = work_ptr + tl.program_id(0) * UNIT
    line = table_ptr + tl.load(unit + TENSOR).to(tl.int64) * COLUMNS
    part = tl.load(unit + PART)
    first = tl.load(unit + FIRST)
    kind = tl.load(line + KIND)
    g_ptr = tl.load(line + GRAD).to(tl.pointer_type(DTYPE))
    spread = tl.load(line + SPREAD).to(tl.int32)
    rows = tl.load(line + ROWS).to(tl.int32)
    run = tl.load(line + RUN).to(tl.int32)
    pieces = tl.load(line + PIECES)
    slot_ptr = slots_ptr + tl.load(line + FIRST_SLOT) + part * pieces + tl.load(unit + PIECE)
    if kind == FLAT:
        _measure_piece(g_ptr, slot_ptr, part, first, spread, rows, run, False, 1)
    elif kind == ALIGNED_FLAT:
        _measure_piece(tl.multiple_of(g_ptr, VECTOR), slot_ptr, part, first, spread, rows, run, False, PER)
    elif kind == IN_RUNS:
        _measure_piece(g_ptr, slot_ptr, part, first, spread, rows, run, True, 1)
    elif kind == ALIGNED_RUNS:
        _measure_piece(tl.multiple_of(g_ptr, VECTOR), slot_ptr, part, first, spread, rows, run, True, PER)
    elif kind == SIDE_BY_SIDE:
        _measure_side_by_side(g_ptr, slot_ptr, pieces, part, first, spread, rows)
    else:
        _measure_rows(g_ptr, slot_ptr, pieces, part, tl.load(line + PARTS), run)


@triton.jit
def finish(table_ptr, items_ptr, slots_ptr, norms_ptr, terms_ptr, PARTS_AT_ONCE: tl.constexpr):
    """||g|| of one part of many pieces, or of some of few; and their part of G. All float64."""
    item = tl.program_id(0)
    part = tl.load(items_ptr + 2 * item + 1).to(tl.int64)
    line = table_ptr + tl.load(items_ptr + 2 * item).to(tl.int64) * COLUMNS
    pieces = tl.load(line + PIECES)
    reach = tl.load(line + REACH).to(tl.float64, bitcast=True)
    norm_ptr = norms_ptr + tl.load(line + FIRST_PART) + part
    slot_ptr = slots_ptr + tl.load(line + FIRST_SLOT) + part * pieces
    lane = tl.arange(0, PARTS_AT_ONCE)
    total = tl.zeros((PARTS_AT_ONCE,), tl.float64)
    if pieces > FEW:
        for k in range(0, pieces, PARTS_AT_ONCE):
            total += tl.load(slot_ptr + k + lane, mask=k + lane < pieces, other=0.0)
        norm = tl.sqrt(tl.sum(total, 0))
        tl.store(norm_ptr, norm)
        tl.store(terms_ptr + item, reach * norm)
    else:
        inside = part + lane < tl.load(line + PARTS)
        for k in range(pieces):
            total += tl.load(slot_ptr + lane * pieces + k, mask=inside, other=0.0)
        norms = tl.sqrt(total)
        tl.store(norm_ptr + lane, norms, mask=inside)
        tl.store(terms_ptr + item, reach * tl.sum(norms, 0))


# -- the step ----------------------------------------------------------------------------------------------


@triton.jit
def _factors(norm, distance):
    """distance / ||g|| in float64, 0 for parts that stay; which parts move; and whether float32 can hold it."""
    moves = (norm > 0) & (norm < float("inf")) & (tl.zeros_like(norm) + distance != 0)
    factor = tl.where(moves, distance / tl.where(moves, norm, 1.0), 0.0)
    near = (tl.abs(factor) >= LEAST_FACTOR) & (tl.abs(factor) <= MOST_FACTOR)
    return factor, moves, near | (moves == 0)


@triton.jit
def _move(w_ptr, g_ptr, mask, factor):
    """w - factor * g, the product in the factor's type; an entry whose update is zero keeps its bits."""
    g = tl.load(g_ptr, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr, mask=mask, other=0.0)
    update = (factor * g.to(factor.dtype)).to(tl.float32)
    moved = (w.to(tl.float32) - update).to(w.dtype)
    tl.store(w_ptr, tl.where(update == 0, w, moved), mask=mask)


@triton.jit
def _step(w_ptr, g_ptr, first, end, factor, rows, run, RUNS: tl.constexpr, PER: tl.constexpr):
    for k in range(first, end, N):
        entry = k + tl.arange(0, N)
        at = _place(entry, rows, run, RUNS, PER)
        _move(w_ptr + at, g_ptr + at, entry < end, factor)


@triton.jit
def _step_side_by_side(w_ptr, g_ptr, row, first, end, factor, moves, rows):
    for k in range(first, end, DEEP):
        entry = (k + tl.arange(0, DEEP))[:, None]
        at = entry.to(tl.int64) * rows + row[None, :]
        _move(w_ptr + at, g_ptr + at, (entry < end) & moves[None, :], factor[None, :])


@triton.jit
def _step_rows(w_ptr, g_ptr, factor, moves, run):
    for k in range(0, run, SHORT):
        entry = (k + tl.arange(0, SHORT))[None, :]
        at = tl.arange(0, MANY)[:, None] * run + entry
        _move(w_ptr + at, g_ptr + at, (entry < run) & moves[:, None], factor[:, None])


@triton.jit
def _move_piece(w_ptr, g_ptr, norm_ptr, part, first, distance, spread, rows, run,
                RUNS: tl.constexpr, PER: tl.constexpr):  # fmt: skip
    first = (first // N) * N
    end = (tl.minimum(spread * run, first + SPAN) // PER) * PER
    begin = _begin(part, spread, rows, run, PER)
    factor, moves, near = _factors(tl.load(norm_ptr), distance)
    if moves:
        if near:
            _step(w_ptr + begin, g_ptr + begin, first, end, factor.to(tl.float32), rows, run, RUNS, PER)
        else:
            _step(w_ptr + begin, g_ptr + begin, first, end, factor, rows, run, RUNS, PER)


@triton.jit
def _move_side_by_side(w_ptr, g_ptr, norm_ptr, part, first, distance, spread, rows):
    row = part % rows + tl.arange(0, WIDE)
    end = tl.minimum(spread, first + DEEP_SPAN)
    begin = _begin(part - part % rows, spread, rows, 1, 1)
    norm = tl.load(norm_ptr + tl.arange(0, WIDE), mask=row < rows, other=0.0)
    factor, moves, near = _factors(norm, distance)
    if tl.min(near.to(tl.int32), 0) > 0:
        _step_side_by_side(w_ptr + begin, g_ptr + begin, row, first, end, factor.to(tl.float32), moves, rows)
    else:
        _step_side_by_side(w_ptr + begin, g_ptr + begin, row, first, end, factor, moves, rows)


@triton.jit
def _move_rows(w_ptr, g_ptr, norm_ptr, part, parts, distance, run):
    inside = part + tl.arange(0, MANY) < parts
    begin = part.to(tl.int64) * run
    norm = tl.load(norm_ptr + tl.arange(0, MANY), mask=inside, other=0.0)
    factor, moves, near = _factors(norm, distance)
    if tl.min(near.to(tl.int32), 0) > 0:
        _step_rows(w_ptr + begin, g_ptr + begin, factor.to(tl.float32), moves, run)
    else:
        _step_rows(w_ptr + begin, g_ptr + begin, factor, moves, run)


@triton.jit
def step(
    table_ptr, work_ptr, norms_ptr, paces_ptr, rates_ptr, eta_ptr, DTYPE: tl.constexpr, PER: tl.constexpr
):
    """Moves a unit's parts by eta times the pace of their tensor, and times its rate where it has one."""
    unit = work_ptr + tl.program_id(0) * UNIT
    tensor = tl.load(unit + TENSOR).to(tl.int64)
    line = table_ptr + tensor * COLUMNS
    part = tl.load(unit + PART)
    first = tl.load(unit + FIRST)
    kind = tl.load(line + KIND)
    w_ptr = tl.load(line + WEIGHT).to(tl.pointer_type(DTYPE))
    g_ptr = tl.load(line + GRAD).to(tl.pointer_type(DTYPE))
    spread = tl.load(line + SPREAD).to(tl.int32)
    rows = tl.load(line + ROWS).to(tl.int32)
    run = tl.load(line + RUN).to(tl.int32)
    norm_ptr = norms_ptr + tl.load(line + FIRST_PART) + part
    rate = tl.load(line + RATE)
    distance = tl.load(eta_ptr) * tl.load(paces_ptr + tensor)
    distance *= tl.load(rates_ptr + rate, mask=rate >= 0, other=1.0)
    if kind == FLAT:
        _move_piece(w_ptr, g_ptr, norm_ptr, part, first, distance, spread, rows, run, False, 1)
    elif kind == ALIGNED_FLAT:
        _move_piece(tl.multiple_of(w_ptr, VECTOR), tl.multiple_of(g_ptr, VECTOR), norm_ptr, part, first,
                    distance, spread, rows, run, False, PER)  # fmt: skip
    elif kind == IN_RUNS:
        _move_piece(w_ptr, g_ptr, norm_ptr, part, first, distance, spread, rows, run, True, 1)
    elif kind == ALIGNED_RUNS:
        _move_piece(tl.multiple_of(w_ptr, VECTOR), tl.multiple_of(g_ptr, VECTOR), norm_ptr, part, first,
                    distance, spread, rows, run, True, PER)  # fmt: skip
    elif kind == SIDE_BY_SIDE:
        _move_side_by_side(w_ptr, g_ptr, norm_ptr, part, first, distance, spread, rows)
    else:
        _move_rows(w_ptr, g_ptr, norm_ptr, part, tl.load(line + PARTS), distance, run)
