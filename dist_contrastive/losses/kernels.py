"""Triton kernels of a log-sum-exp over inner products and of its gradients: products are never stored.

A tile of anchors stays on the chip while tiles of others pass by, as queries and keys do in FlashAttention (Dao et al. 2022,
algorithm 1; Dao 2023, algorithm 1): the gradient of an anchor's log-sum-exp is an attention whose values are the keys, known
when the last tile has passed. The gradient of others needs the finished log-sum-exp, and the products again.

The precision is that of float32, at the speed of tensor cores. One product of TF32 would be wrong by 5e-4 of a similarity;
Triton's own three ("tf32x3") are exact enough, but do not fit in the registers (some 20 KB of them spilt on sm_80). So a float32
comes as the sum of two float16, `high + low`, scaled to at most 1: 22 bits, and never worse than 2**-25 of the largest, which is
float32's own rounding there. Of the products of two such sums low · low is beyond float32 and left out. Products of float16 are
exact in float32, in which all sums, exponentials and logarithms are taken.

Unmeasured: they run in Triton's interpreter, beside float64, and compile for sm_80 and sm_90; no GPU has run them yet.
"""

from typing import no_type_check

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""Exponentials and logarithms are taken to base 2, for which there are instructions."""
UNIT = tl.constexpr(32768.0)
"""What a weight of 1 is in float16, so that one of 1e-12 is still a number: millions of them may be a part of a sum."""

NONE, ITSELF, SAMPLE = (tl.constexpr(i) for i in range(3))
"""What an anchor is not compared with: nothing, its own row of the others, all rows of its own sample."""


@triton.jit
@no_type_check
def _load(pointer, rows, num_rows, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, PARTS: tl.constexpr):
    """Rows of a contiguous float16 [PARTS, num_rows, SIZE], zero where there are none: high and, of two parts, low."""
    rows = rows.to(tl.int64)[:, None]
    features = tl.arange(0, BLOCK_SIZE)[None, :]
    where = pointer + rows * SIZE + features
    mask = (rows < num_rows) & (features < SIZE)
    high = tl.load(where, mask=mask, other=0.0)
    low = high
    if PARTS == 2:
        low = tl.load(where + num_rows.to(tl.int64) * SIZE, mask=mask, other=0.0)
    return high, low


@triton.jit
@no_type_check
def _products(a_high, a_low, b_high, b_low, PARTS: tl.constexpr):
    """a @ bᵀ in float32; what is smaller is added first."""
    if PARTS == 2:
        products = tl.dot(a_low, tl.trans(b_high))
        products = tl.dot(a_high, tl.trans(b_low), products)
        products = tl.dot(a_high, tl.trans(b_high), products)
    else:
        products = tl.dot(a_high, tl.trans(b_high))
    return products


@triton.jit
@no_type_check
def _add_weighted(total, weights, high, low, PARTS: tl.constexpr):
    """total + UNIT · weights @ (high + low), for float32 weights of at most 1."""
    weights = weights * UNIT
    of_high = weights.to(tl.float16)
    of_low = (weights - of_high.to(tl.float32)).to(tl.float16)
    if PARTS == 2:
        total = tl.dot(of_high, low, total)
    total = tl.dot(of_low, high, total)
    return tl.dot(of_high, high, total)


@triton.jit
@no_type_check
def _is_compared(anchors, others, num_anchors, num_others, offset, batch_size, EXCLUDED: tl.constexpr):
    """Of each pair of an anchor and another, whether it is in the sum."""
    compared = (anchors < num_anchors) & (others < num_others)
    if EXCLUDED == ITSELF:
        compared &= anchors + offset != others
    if EXCLUDED == SAMPLE:
        # Beyond this rank's own rows the remainder means nothing, and is not looked at.
        own = (others >= offset) & (others < offset + num_anchors)
        compared &= ~(own & (anchors % batch_size == (others - offset) % batch_size))
    return compared


@triton.jit(do_not_specialize=["num_anchors", "num_others", "offset", "batch_size", "per_part"])
@no_type_check
def log_sum_exp(
    anchors,  # float16 [PARTS, num_anchors, SIZE]
    others,  # float16 [PARTS, num_others, SIZE]
    factor,  # float32 [1]: what the products of the scaled are multiplied with
    sums,  # out, float32 [parts, num_anchors]: the log-sum-exp over a part of the others, -inf where none is compared
    averages,  # out, float32 [parts, num_anchors, SIZE]: the others of the part, averaged with their softmax
    num_anchors,
    num_others,
    offset,
    batch_size,
    per_part,  # others of a part, a multiple of OTHERS
    EXCLUDED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    ANCHORS: tl.constexpr,
    OTHERS: tl.constexpr,
    NEEDS_AVERAGES: tl.constexpr,
):
    """Program (i, p): a tile of anchors, a part of the others. Without NEEDS_AVERAGES `averages` is not touched."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    high, low = _load(anchors, rows, num_anchors, SIZE, BLOCK_SIZE, PARTS)
    to_base_2 = tl.load(factor) * LOG2_E
    largest = tl.full([ANCHORS], float("-inf"), tl.float32)
    total = tl.zeros([ANCHORS], tl.float32)
    average = tl.zeros([ANCHORS, BLOCK_SIZE], tl.float32)
    for start in range(part * per_part, tl.minimum((part + 1) * per_part, num_others), OTHERS):
        columns = start + tl.arange(0, OTHERS)
        other_high, other_low = _load(others, columns, num_others, SIZE, BLOCK_SIZE, PARTS)
        logits = _products(high, low, other_high, other_low, PARTS) * to_base_2
        compared = _is_compared(rows[:, None], columns[None, :], num_anchors, num_others, offset, batch_size, EXCLUDED)
        logits = tl.where(compared, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        # As long as nothing is compared, there is no largest to be subtracted.
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(logits - reference[:, None])
        shrinks = tl.exp2(largest - reference)
        total = total * shrinks + tl.sum(weights, 1)
        if NEEDS_AVERAGES:
            average = _add_weighted(average * shrinks[:, None], weights, other_high, other_low, PARTS)
        largest = larger
    out = part.to(tl.int64) * num_anchors + rows
    tl.store(sums + out, (largest + tl.log2(total)) / LOG2_E, mask=rows < num_anchors)
    if NEEDS_AVERAGES:
        average = average / (tl.where(total == 0, 1.0, total) * UNIT)[:, None]
        features = tl.arange(0, BLOCK_SIZE)[None, :]
        mask = (rows < num_anchors)[:, None] & (features < SIZE)
        tl.store(averages + out[:, None] * SIZE + features, average, mask=mask)


@triton.jit(do_not_specialize=["num_anchors", "num_others", "offset", "batch_size", "per_part"])
@no_type_check
def gradient_of_others(
    anchors,  # float16 [PARTS, num_anchors, SIZE]
    others,  # float16 [PARTS, num_others, SIZE]
    factor,  # float32 [1]: what the products of the scaled are multiplied with
    sums,  # float32 [num_anchors]: the log-sum-exp over all others
    upstream,  # float32 [num_anchors]: the gradient of these, scaled to at most 1
    gradients,  # out, float32 [parts, num_others, SIZE]: Σ over the part's anchors of upstream · softmax · anchor
    num_anchors,
    num_others,
    offset,
    batch_size,
    per_part,  # anchors of a part, a multiple of ANCHORS
    EXCLUDED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    ANCHORS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Program (j, p): a tile of others, a part of the anchors."""
    part = tl.program_id(1)
    columns = tl.program_id(0) * OTHERS + tl.arange(0, OTHERS)
    high, low = _load(others, columns, num_others, SIZE, BLOCK_SIZE, PARTS)
    to_base_2 = tl.load(factor) * LOG2_E
    gradient = tl.zeros([OTHERS, BLOCK_SIZE], tl.float32)
    for start in range(part * per_part, tl.minimum((part + 1) * per_part, num_anchors), ANCHORS):
        rows = start + tl.arange(0, ANCHORS)
        anchor_high, anchor_low = _load(anchors, rows, num_anchors, SIZE, BLOCK_SIZE, PARTS)
        sums_of_rows = tl.load(sums + rows, mask=rows < num_anchors, other=0.0) * LOG2_E
        of_rows = tl.load(upstream + rows, mask=rows < num_anchors, other=0.0)
        logits = _products(high, low, anchor_high, anchor_low, PARTS) * to_base_2
        compared = _is_compared(rows[None, :], columns[:, None], num_anchors, num_others, offset, batch_size, EXCLUDED)
        softmax = tl.where(compared, tl.exp2(logits - sums_of_rows[None, :]), 0.0)
        gradient = _add_weighted(gradient, softmax * of_rows[None, :], anchor_high, anchor_low, PARTS)
    features = tl.arange(0, BLOCK_SIZE)[None, :]
    out = (part.to(tl.int64) * num_others + columns)[:, None] * SIZE + features
    tl.store(gradients + out, gradient / UNIT, mask=(columns < num_others)[:, None] & (features < SIZE))
