"""S more samples streamed into the running average, in one launch that reads the logits from memory once.

The log-probabilities of a row need its log-sum-exp first, so each row is read twice; the programs are ordered such that
the second reading comes soon enough after the first to be served by the cache. Group g of the programs, in the order in
which they start, scans the rows of batch element g, merges the scans of g − 1, and accumulates g − 2. A program waits
for what it needs; all of that was started before it, so the wait ends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swag_kernels.triton.launch import kernel, on_device_of, options

_LOWEST = tl.constexpr(-87.33654)  # e^x is subnormal below
_TINY = tl.constexpr(-60.0)  # below, only the logarithm of a probability is kept
_FIELDS = tl.constexpr(4)  # of a scan: maximum, sum, weighted sum, argmax
_ROW = tl.constexpr(3)  # of a row: maximum, logarithm of the sum, argmax
PART = 16384  # classes of one scan, or a multiple
PARTS = 16  # scans of a row, at most
ROWS = 16  # whose scans are merged at once
COLUMNS = 1024  # classes that a program accumulates


@triton.jit
def _bounded(difference):
    return tl.where(difference < _LOWEST, _LOWEST, difference)  # NaN stays NaN


@triton.jit
def _scan(p_row, p_scan, first, last, B_C: tl.constexpr):
    """Of classes first to last − 1: max, Σ e^(x − max), Σ e^(x − max) (x − max), and the first class with the maximum."""
    o_c = tl.arange(0, B_C)
    top = tl.full([B_C], -float("inf"), tl.float32)
    total = tl.zeros([B_C], tl.float32)
    weighted = tl.zeros([B_C], tl.float32)
    argmax = tl.zeros([B_C], tl.int32)
    for c in tl.range(first, last, B_C):
        x = tl.load(p_row + c + o_c, mask=c + o_c < last, other=-float("inf")).to(tl.float32)
        difference = tl.where(x == top, 0.0, x - top)
        higher = difference > 0
        distance = _bounded(tl.where(higher, -difference, difference))
        factor = tl.exp(distance)
        weighted = tl.where(higher, factor * (weighted + distance * total), weighted + factor * distance)
        total = tl.where(higher, factor * total + 1.0, total + factor)
        argmax = tl.where(higher, c + o_c, argmax)
        top = tl.where(higher, x, top)
    highest = tl.max(top, axis=0)
    distance = _bounded(tl.where(top == highest, 0.0, top - highest))
    factor = tl.exp(distance)
    tl.store(p_scan, highest)
    tl.store(p_scan + 1, tl.sum(factor * total, axis=0))
    tl.store(p_scan + 2, tl.sum(factor * (weighted + distance * total), axis=0))
    tl.store(p_scan + 3, tl.min(tl.where(top == highest, argmax, 2147483647), axis=0).to(tl.float32))


@triton.jit
def _merge(p_scans, p_rows, p_entropy, seen, samples, parts, B_S: tl.constexpr, B_P: tl.constexpr):
    """Maximum, logarithm of the sum and argmax of each sample's row, and the mean of their entropies."""
    o_p = tl.arange(0, B_P)[None, :]
    before = tl.load(p_entropy)
    change = tl.zeros([B_S], tl.float32)
    for s in tl.range(0, samples, B_S):
        o_s = s + tl.arange(0, B_S)
        p_scan = p_scans + (o_s[:, None] * parts + o_p) * _FIELDS
        m_scan = (o_s < samples)[:, None] & (o_p < parts)
        top = tl.load(p_scan, mask=m_scan, other=-float("inf"))  # [B_S, B_P]
        total = tl.load(p_scan + 1, mask=m_scan, other=0.0)
        weighted = tl.load(p_scan + 2, mask=m_scan, other=0.0)
        argmax = tl.load(p_scan + 3, mask=m_scan, other=0.0)
        highest = tl.max(top, axis=1)
        distance = _bounded(tl.where(top == highest[:, None], 0.0, top - highest[:, None]))
        factor = tl.exp(distance)
        weighted = tl.sum(factor * (weighted + distance * total), axis=1)
        total = tl.sum(factor * total, axis=1)
        argmax = tl.min(tl.where(top == highest[:, None], argmax, 1e9), axis=1)
        undefined = highest - highest  # NaN if no class, or one without bound, has the maximum
        log_total = tl.log(total)
        entropy = undefined + (log_total - weighted / total)
        entropy = tl.where(entropy < 1e-30, 0.0, entropy)
        change += tl.where(o_s < samples, entropy - before, 0.0)
        tl.store(p_rows + o_s * _ROW, highest, mask=o_s < samples)
        tl.store(p_rows + o_s * _ROW + 1, undefined + log_total, mask=o_s < samples)
        tl.store(p_rows + o_s * _ROW + 2, argmax, mask=o_s < samples)
    tl.store(p_entropy, before + tl.sum(change, axis=0) / (seen + samples).to(tl.float32))


@triton.jit
def _accumulate(
    p_logits,
    p_rows,
    p_log_sum,
    p_m2,
    p_votes,
    c,
    seen,
    samples,
    classes,
    stride,
    GROUP: tl.constexpr,
    UNROLL: tl.constexpr,
    B_C: tl.constexpr,
):
    """Classes c to c + B_C − 1 of one batch element, all samples."""
    o_c = c + tl.arange(0, B_C)
    m_c = o_c < classes
    now = tl.zeros([B_C], tl.float32)
    mean = tl.zeros([B_C], tl.float32)
    squares = tl.zeros([B_C], tl.float32)
    largest = tl.full([B_C], -float("inf"), tl.float32)
    votes = tl.load(p_votes + o_c, mask=m_c, other=0.0)
    for s in tl.range(0, samples, UNROLL * GROUP):
        logits = ()
        for i in tl.static_range(UNROLL * GROUP):
            p_x = p_logits + tl.cast(s + i, tl.int64) * stride + o_c
            logits = logits + (tl.load(p_x, mask=m_c & (tl.zeros_like(o_c) + (s + i) < samples), other=0.0),)
        for i in tl.static_range(UNROLL):
            if samples > s + i * GROUP:
                draw = tl.zeros([B_C], tl.float32)
                for j in tl.static_range(GROUP):
                    p_row = p_rows + (s + i * GROUP + j) * _ROW
                    log_prob = logits[i * GROUP + j].to(tl.float32) - tl.load(p_row) - tl.load(p_row + 1)
                    prob = tl.exp(log_prob)
                    now += prob
                    draw += prob
                    largest = tl.where(log_prob > largest, log_prob, largest)
                    votes += (o_c.to(tl.float32) == tl.load(p_row + 2)).to(tl.float32)
                draw = draw / GROUP
                index = tl.cast(s // GROUP + i + 1, tl.float32)
                delta = draw - mean
                mean += delta / index
                squares += delta * (draw - mean)

    before = tl.load(p_log_sum + o_c, mask=m_c, other=-float("inf"))
    old = tl.exp(before)
    draws_before = (seen // GROUP).to(tl.float32)
    draws_now = (samples // GROUP).to(tl.float32)
    delta = mean - old / tl.maximum(seen, 1).to(tl.float32)
    squares += delta * delta * (draws_before * draws_now / (draws_before + draws_now))
    largest = tl.where(before > largest, before, largest)
    tiny = largest < _TINY
    log_sum = tl.log(old + now)
    if tl.max((tiny & m_c).to(tl.int32), axis=0) == 1:
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        shifted = tl.exp(before - shift)
        for s in tl.range(0, samples):
            p_x = p_logits + tl.cast(s, tl.int64) * stride + o_c
            x = tl.load(p_x, mask=m_c, other=0.0).to(tl.float32)
            p_row = p_rows + s * _ROW
            shifted += tl.exp(x - tl.load(p_row) - tl.load(p_row + 1) - shift)
        log_sum = tl.where(tiny, shift + tl.log(shifted), log_sum)
        squares = tl.where(tiny, 0.0, squares)
    tl.store(p_log_sum + o_c, log_sum, mask=m_c)
    tl.store(p_m2 + o_c, tl.load(p_m2 + o_c, mask=m_c) + squares, mask=m_c)
    tl.store(p_votes + o_c, votes, mask=m_c)


@triton.jit
def _wait(p_flag, number):
    while tl.atomic_add(p_flag, 0, sem="acquire") < number:
        pass


@triton.jit
def _signal(p_flag):
    tl.debug_barrier()  # every thread's stores come first
    tl.atomic_add(p_flag, 1, sem="release")


@kernel
def average_kernel(
    p_logits,
    p_log_sum,
    p_m2,
    p_votes,
    p_entropy,
    p_count,
    p_scans,
    p_rows,
    p_flags,
    samples: tl.int32,
    batch: tl.int32,
    classes: tl.int32,
    part: tl.int32,
    parts: tl.int32,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr,
    B_S: tl.constexpr,
    B_P: tl.constexpr,
    B_C: tl.constexpr,
):
    """p_scans [batch, samples, parts, 4] and p_rows [batch, samples, 3] are scratch; p_flags [1 + 2 batch] holds zeros."""
    if ALIGNED:
        classes = classes // 16 * 16  # the same number, which the compiler then knows to be a multiple of 16
    part = part // B_C * B_C
    seen = tl.load(p_count)
    ticket = tl.atomic_add(p_flags, 1)
    scans = samples * parts
    each = scans + 1 + tl.cdiv(classes, B_C)
    group, task = ticket // each, ticket % each
    stride = batch.to(tl.int64) * classes
    if task < scans:
        b = group
        if b < batch:
            s, i_part = task // parts, task % parts
            p_row = p_logits + s * stride + b.to(tl.int64) * classes
            if ALIGNED:
                p_row = tl.multiple_of(p_row, 16)
            p_scan = p_scans + ((b * samples + s) * parts + i_part) * _FIELDS
            _scan(p_row, p_scan, i_part * part, tl.minimum((i_part + 1) * part, classes), B_C)
            _signal(p_flags + 1 + b)
    elif task == scans:
        b = group - 1
        if (b >= 0) & (b < batch):
            _wait(p_flags + 1 + b, scans)
            p_scan = p_scans + b * samples * parts * _FIELDS
            _merge(p_scan, p_rows + b * samples * _ROW, p_entropy + b, seen, samples, parts, B_S, B_P)
            _signal(p_flags + 1 + batch + b)
    else:
        b = group - 2
        if b >= 0:
            _wait(p_flags + 1 + batch + b, 1)
            row = b.to(tl.int64) * classes
            p_row, p_log_sum, p_m2, p_votes = p_logits + row, p_log_sum + row, p_m2 + row, p_votes + row
            if ALIGNED:
                p_row, p_log_sum = tl.multiple_of(p_row, 16), tl.multiple_of(p_log_sum, 16)
                p_m2, p_votes = tl.multiple_of(p_m2, 16), tl.multiple_of(p_votes, 16)
            _accumulate(
                p_row,
                p_rows + b * samples * _ROW,
                p_log_sum,
                p_m2,
                p_votes,
                (task - scans - 1) * B_C,
                seen,
                samples,
                classes,
                stride,
                GROUP,
                UNROLL,
                B_C,
            )


def bayes_average_(
    log_sum: Tensor, m2: Tensor, votes: Tensor, entropy: Tensor, count: Tensor, logits: Tensor, group: int
) -> None:
    samples, batch, classes = logits.shape
    if logits.numel():
        logits = logits.contiguous()
        part = PART
        while classes > PARTS * part:
            part *= 2
        parts = triton.cdiv(classes, part)
        scans = torch.empty(batch, samples, parts, _FIELDS.value, device=logits.device)
        rows = torch.empty(batch, samples, _ROW.value, device=logits.device)
        flags = torch.zeros(1 + 2 * batch, dtype=torch.int32, device=logits.device)
        each = samples * parts + 1 + triton.cdiv(classes, COLUMNS)
        aligned = classes % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (logits, log_sum, m2, votes))
        with on_device_of(logits):
            average_kernel[(batch + 2) * each,](
                logits,
                log_sum,
                m2,
                votes,
                entropy,
                count,
                scans,
                rows,
                flags,
                samples,
                batch,
                classes,
                part,
                parts,
                GROUP=group,
                ALIGNED=aligned,
                UNROLL=(4 if aligned else 2) // group,
                B_S=ROWS,
                B_P=PARTS,
                B_C=COLUMNS,
                **options(4, registers=128),
            )
    count += samples
