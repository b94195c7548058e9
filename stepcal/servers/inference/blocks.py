"""What a calibration looks at: requests of one stage in one span of time, and the means measured over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepcal.errors import InputError
from stepcal.servers.log import WHOLE, ServedLog
from stepcal.units import MS_PER_S, BoolArray, FloatArray, IntArray

TRAIN_SHARE, VALIDATION_SHARE = 0.6, 0.2
"""Temporal split of each run, as the study's: fitted, looked at while choosing, judged."""
BLOCKS = 4
"""Blocks of time that each stage's training part is cut into: a mean of each is one figure."""
SMALLEST_BLOCK = 8
"""Requests below which a block says nothing."""
BLOCK_LOG_SD = {"tpot": 0.01, "ttft": 0.05}
"""What a block of time adds of its own to the error of its stage: warm-up and drift, seen within stages of the 16 runs."""
QUEUED_TTFT_STEPS = 20.0
"""From this many steps on the first token waits for a queue, where 1% of step time is far more than 1% of the wait."""
QUEUED_LOG_SD = {"tpot": 0.02, "ttft": 0.3}
NOISE_SHARE = 0.1
"""The replay has the same arrivals and lengths, so what varies between requests is not all noise: a tenth of it is."""


Latencies = tuple[FloatArray, FloatArray]
"""E2E latency and TTFT of each request, in seconds."""


@dataclass(frozen=True)
class Block:
    """Requests of one stage in one span of time, and the means measured over them."""

    log: int
    stage: int
    chosen: IntArray
    means: dict[str, float]
    log_sd: dict[str, float]


def training_mask(log: ServedLog, share: float = TRAIN_SHARE) -> BoolArray:
    """Return which requests arrive in the first share of a log and end before the rest begins.

    Raises
    ------
    InputError
        If single requests are not at hand.
    """
    if log.e2e_s is None:
        raise InputError(
            f"`{log.run}` has summaries only; a calibration needs single requests. `stepcal ingest` reads them "
            "from the load generator's own files."
        )
    n = len(log.requests)
    n_train = round(share * n)
    arrival = log.requests.arrival_s
    ended = arrival + np.where(np.isnan(log.e2e_s), log.timeout_s, log.e2e_s)
    boundary = arrival[n_train] if n_train < n else np.inf
    return (np.arange(n) < n_train) & (ended <= boundary)


def blocks_of(logs: Sequence[ServedLog], masks: Sequence[BoolArray], n_blocks: int = BLOCKS) -> list[Block]:
    """Cut the chosen requests of logs into blocks of time within each stage, and take the means of each."""
    result = []
    for i, (log, mask) in enumerate(zip(logs, masks, strict=True)):
        if log.e2e_s is None or log.ttft_s is None:
            result += _summary_blocks(i, log, mask)
            continue
        done = mask & ~np.isnan(log.e2e_s)
        for stage in np.unique(log.stage):
            rows = np.flatnonzero(done & (log.stage == stage))
            parts = np.array_split(rows, min(n_blocks, max(len(rows) // SMALLEST_BLOCK, 1)))
            result += [_block(i, log, int(stage), chosen) for chosen in parts if len(chosen) >= SMALLEST_BLOCK]
    return result


def _summary_blocks(i: int, log: ServedLog, mask: BoolArray) -> list[Block]:
    """A block a stage whose requests are all chosen, from the summaries of a log without single requests."""
    known = log.summaries[log.summaries["statistic"] == "mean"].set_index(["split", "metric"])["value"]
    stages = np.unique(log.stage)
    result = []
    for stage in stages:
        rows = np.flatnonzero(log.stage == stage)
        split = f"stage {stage}" if len(stages) > 1 else WHOLE
        if not mask[rows].all() or (split, "tpot") not in known.index:
            continue
        means = {name: float(known[split, name]) / MS_PER_S for name in BLOCK_LOG_SD if (split, name) in known.index}
        result.append(Block(i, int(stage), rows, means, {name: BLOCK_LOG_SD[name] for name in means}))
    return result


def _block(i: int, log: ServedLog, stage: int, chosen: IntArray) -> Block:
    values = block_values(log, chosen, log.e2e_s, log.ttft_s)
    means = {name: float(v.mean()) for name, v in values.items()}
    is_queued = "ttft" in means and means["ttft"] > QUEUED_TTFT_STEPS * means["tpot"]
    expected = QUEUED_LOG_SD if is_queued else BLOCK_LOG_SD
    noise = {name: float(v.std() / v.mean() / np.sqrt(len(v))) for name, v in values.items()}
    sds = {name: float(np.hypot(expected[name], NOISE_SHARE * noise[name])) for name in means}
    return Block(i, stage, chosen, means, sds)


def block_values(
    log: ServedLog, chosen: IntArray, e2e_s: FloatArray | None, ttft_s: FloatArray | None
) -> dict[str, FloatArray]:
    """Figures of requests that a block is judged by: time per output token, and TTFT where the client streamed."""
    if e2e_s is None or ttft_s is None:
        return {}
    e2e, ttft = e2e_s[chosen], ttft_s[chosen]
    tokens = np.asarray(log.requests.output_tokens, dtype=float)[chosen]
    if np.isnan(ttft).all():
        return {"tpot": e2e / tokens}  # without streaming: all of it, over all tokens
    gaps = np.maximum(tokens - 1, 1)
    known = ~np.isnan(ttft) & ~np.isnan(e2e) & (tokens > 1)
    return {"tpot": ((e2e - ttft) / gaps)[known], "ttft": ttft[~np.isnan(ttft)]}


def figures_of(blocks: Sequence[Block]) -> list[tuple[Block, str]]:
    """Return the blocks' figures in the order of residuals: block by block, metric by metric."""
    return [(block, name) for block in blocks for name in block.means]


def log_errors(logs: Sequence[ServedLog], blocks: Sequence[Block], simulated: Sequence[Latencies]) -> FloatArray:
    """Return ``log predicted - log measured`` of each figure; NaN where nothing that was measured completes.

    Parameters
    ----------
    logs : sequence of ServedLog
    blocks : sequence of Block
    simulated : sequence of (ndarray, ndarray)
        Of each log: E2E latency and TTFT of each request in seconds.

    Returns
    -------
    ndarray, shape (n_figures,)
    """
    rows: list[float] = []
    for block in blocks:
        e2e, ttft = simulated[block.log]
        is_unary = "ttft" not in block.means
        predicted = block_values(logs[block.log], block.chosen, e2e, np.full_like(ttft, np.nan) if is_unary else ttft)
        for name, mean in block.means.items():
            here = predicted.get(name, np.zeros(0))
            here = here[~np.isnan(here)]
            known = here.size > 0 and here.mean() > 0
            rows.append(float(np.log(here.mean() / mean)) if known else float("nan"))
    return np.array(rows, dtype=np.float64)
