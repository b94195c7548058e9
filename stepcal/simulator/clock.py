"""How long steps take, compiled: one step, and any number of decode-only steps in closed form.

With an unchanged batch of d decoding requests, each step reads d more KV tokens than the one before, so the duration
of step i is ``max(c, a + b i)``: affine in i, above a constant (the host, where it overlaps with the GPU, or a
floor).
"""

import math

import numpy as np

from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.layout import Batch, Times
from stepcal.units import FloatArray, IntArray

# Gaps between tokens are counted in bins whose width is 1/512 of a power of two: quantiles are exact to 0.1 %.
GAP_BINS_PER_OCTAVE = 512
GAP_OCTAVES = 40
GAP_SMALLEST_US = 2.0**-6
N_GAP_BINS = GAP_BINS_PER_OCTAVE * GAP_OCTAVES


@inlined
def step_duration(times: Times, batch: Batch, rejected: float) -> float:
    """Duration of one step in microseconds."""
    n_prefill, n_decode = batch.prefill_reqs, batch.decode_reqs
    gpu = (
        times.constant_us
        + times.tokens_us[batch.prefill_tokens + n_decode]
        + times.requests_us[n_prefill + n_decode]
        + times.decode_requests_us[n_decode]
        + times.kv_us * batch.decode_kv
        + times.waiting_us * batch.n_waiting
    )
    gpu += times.window_kv_us * batch.window_kv
    if times.batch_us.shape[1] > 1:
        gpu += times.batch_us[batch.prefill_tokens, n_decode]
    if n_prefill:
        gpu += (
            times.prefill_tokens_us[batch.prefill_tokens]
            + times.prefill_kv_us * batch.prefill_kv
            + times.prefill_pair_us * batch.prefill_pairs
            + times.prefill_window_kv_us * batch.prefill_window_kv
            + times.window_pair_us * batch.window_pairs
        )
    host = _host_duration(times, n_prefill + n_decode, batch.n_waiting, rejected)
    return max(times.floor_us, max(gpu, host) if times.overlap else gpu + host)


@inlined
def _host_duration(times: Times, n_requests: int, n_waiting: int, rejected: float) -> float:
    return (
        times.host_constant_us
        + times.host_requests_us[n_requests]
        + times.host_waiting_us * n_waiting
        + times.host_rejected_us * rejected
    )


@inlined
def decode_line(
    times: Times, n_decode: int, kv_tokens: int, n_waiting: int, rejected: float
) -> tuple[float, float, float]:
    """Coefficients a, b, c of the durations ``max(c, a + b i)`` of consecutive decode-only steps."""
    gpu = (
        times.constant_us
        + times.tokens_us[n_decode]
        + times.requests_us[n_decode]
        + times.decode_requests_us[n_decode]
        + times.kv_us * kv_tokens
        + times.waiting_us * n_waiting
    )
    if times.batch_us.shape[1] > 1:
        gpu += times.batch_us[0, n_decode]
    host = _host_duration(times, n_decode, n_waiting, rejected)
    slope = times.kv_us * n_decode
    if times.overlap:
        return gpu, slope, max(times.floor_us, host)
    return gpu + host, slope, times.floor_us


@inlined
def elapsed(a: float, b: float, c: float, n_steps: int) -> float:
    """Sum of ``max(c, a + b i)`` over ``0 <= i < n_steps``."""
    if b >= 0.0:
        n_flat = 0  # steps at c, then the line
        if a < c:
            n_flat = n_steps if a + b * n_steps < c else min(n_steps, math.ceil((c - a) / b))
        n_line = n_steps - n_flat
        return c * n_flat + n_line * (a + b * (n_flat + n_steps - 1) * 0.5)
    n_line = 0  # the line falls until it reaches c
    if a > c:
        n_line = n_steps if a + b * n_steps > c else min(n_steps, math.ceil((a - c) / -b))
    return n_line * (a + b * (n_line - 1) * 0.5) + c * (n_steps - n_line)


@compiled
def steps_until(a: float, b: float, c: float, time_us: float, n_max: int) -> int:
    """Fewest steps whose durations add up to `time_us` or more; `n_max` if that many do not suffice."""
    if elapsed(a, b, c, n_max - 1) < time_us:
        return n_max
    low, high = 1, n_max - 1
    first = max(c, a)
    if b >= 0.0 and first > 0.0:  # the first step is the shortest: a bound that is usually tight
        high = min(high, int(min(time_us / first, 1.0 * high)) + 1)
        longest = max(c, a + b * high)
        low = max(1, min(high, int(min(time_us / longest, 1.0 * high))))
        if elapsed(a, b, c, high) < time_us:
            high = n_max - 1
    while low < high:
        middle = (low + high) // 2
        if elapsed(a, b, c, middle) < time_us:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def gap_bin(gap_us: float) -> int:
    """Bin of a gap between two tokens of a request."""
    if gap_us <= GAP_SMALLEST_US:
        return 0
    mantissa, exponent = math.frexp(gap_us / GAP_SMALLEST_US)
    return min(N_GAP_BINS - 1, (exponent - 1) * GAP_BINS_PER_OCTAVE + int((2.0 * mantissa - 1.0) * GAP_BINS_PER_OCTAVE))


def gap_bin_centres() -> FloatArray:
    """Geometric centre of each bin in microseconds, shape (N_GAP_BINS,)."""
    edges = np.arange(N_GAP_BINS + 1)
    low = 2.0 ** (edges // GAP_BINS_PER_OCTAVE) * (1.0 + (edges % GAP_BINS_PER_OCTAVE) / GAP_BINS_PER_OCTAVE)
    return GAP_SMALLEST_US * np.sqrt(low[:-1] * low[1:])


@inlined
def count_gaps(
    gap_counts: IntArray, gap_sums: FloatArray, stage_decoding: IntArray, a: float, b: float, c: float, n_steps: int
) -> None:
    """Count the gaps that `n_steps` decode steps put between the tokens of every decoding request, by stage of load."""
    total = elapsed(a, b, c, n_steps)
    first, last = gap_bin(max(c, a)), gap_bin(max(c, a + b * (n_steps - 1)))
    for stage in range(stage_decoding.size):
        weight = stage_decoding[stage]
        if weight == 0:
            continue
        gap_sums[stage] += weight * total
        if first == last:
            gap_counts[stage, first] += weight * n_steps
        else:
            for i in range(n_steps):
                gap_counts[stage, gap_bin(max(c, a + b * i))] += weight
