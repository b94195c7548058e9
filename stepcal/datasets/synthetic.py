"""Invented step rows of the study's size: an exercise for the pipeline, never evidence.

Thirteen of the sixteen experiments have no public features. These rows stand in for them so that fits can be run and
timed at full size (122,752 rows). They are drawn from a description of the server's queue and of the label that the
study used (the scheduler's CPU time), not from the four-component family that is fitted to them, and no verdict may
rest on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pandas as pd

from stepcal.datasets.facts import experiments, load_stages, measured, published_h1_per_experiment
from stepcal.datasets.schemas import validate_steps
from stepcal.errors import InputError
from stepcal.units import US_PER_S, FloatArray, IntArray

BASE_COST_US = 25.0
"""Scheduler's time for an empty batch, µs. From the public traces: medians at 1-10 running requests are 58-84 µs."""

RUNNING_COST_US = 7.0
"""Scheduler's time per running request, µs. Measured: medians of the label in the public traces."""

WAITING_COST_US = 8.0
"""Scheduler's time per queued request, µs. Chosen within what the overloaded runs' labels suggest (3-30 µs)."""

PREFILL_COST_US = 30.0
"""Scheduler's time to admit a request, µs. Chosen."""

CONTENTION_ABOVE = 60
"""Running requests above which the scheduler's threads contend. Measured: the label jumps from 0.4 to 3-5 ms there."""

CONTENTION_PER_REQUEST_MAX = 0.2
"""Largest growth of that cost per request above, as a share. Chosen; each run draws its own from 0 to this."""

PREFILL_STEPS_PER_REQUEST = 1.5
"""Steps in which a request counts as prefilling. Measured: 0.42 such requests a step where 0.27 arrive."""

LABEL_SIGMA = 0.3
"""Standard deviation of the label's logarithm at given load. Chosen near that of the public traces below contention."""

SAMPLED_SHARE = 0.1
"""Share of steps that the trace keeps. Measured: the mean gap of step ids is 10.0-10.3."""

INTERVAL_SIGMA = 0.05
"""Standard deviation of the logarithm of a step's interval. Chosen."""

DEPTH_CORRELATION = 0.99
"""Correlation of the running depth from one sampled step to the next. Measured: 0.993-0.998, stages included."""

PATIENCE_S = 300.0
"""Time after which the client gives up, s. Measured: failed requests last 300.0-301.0 s."""

UNCACHED_TOKENS_MAX = 16
"""Most prompt tokens computed on a prefix-cache hit: one block. Rule of vLLM 0.15.1's scheduler."""

LARGE_PREFILLS = 8
"""Sampled steps per run with a prompt that is not cached. Measured: 7-10 per public trace."""

LARGE_PREFILL_TOKENS_MIN = 65
LARGE_PREFILL_WITHIN = 40
"""First sampled steps of a run that the large prefills fall in. Chosen."""

PURE_PREFILL_SHARE = 6 / 16
"""Share of runs that begin with a step without decodes. Published: 6 pure-prefill steps in 16 runs."""

SHORTEST_LABEL_US = 12.0
"""Least label, µs. Measured: the minimum of the public traces."""

PREEMPTIONS_PER_FULL_STEP = 0.02
"""Mean preemptions of a step that finds no free block. Chosen."""

_NANOSECONDS_PER_MICROSECOND = 1_000
_MICROSECONDS_PER_MILLISECOND = 1e3


def simulated_step_rows(*, seed: int, n_steps: int | None = None) -> pd.DataFrame:
    """Draw step rows for all 16 experiments; an invention to exercise the pipeline, never used in a verdict.

    The running depth is an autocorrelated walk around what Little's law gives from the rate and the measured latency of
    each load stage; the queue of an overloaded run grows until clients give up; prompts are mostly cached. The label
    rises with the running requests and bends upwards where threads contend.

    Parameters
    ----------
    seed : int
        Same seed, same rows.
    n_steps : int, optional
        Rows of each experiment; by default as many as the study sampled, 122,752 in all.

    Returns
    -------
    DataFrame
        Canonical step rows sorted by experiment_id and step_id.

    Raises
    ------
    InputError
        If `n_steps` is below 1 or `seed` is negative.
    """
    if n_steps is not None and n_steps < 1:
        raise InputError(f"`n_steps` is {n_steps}, but each experiment needs at least 1 row.")
    if seed < 0:
        raise InputError(f"`seed` is {seed}, but must be at least 0.")
    published = published_h1_per_experiment().groupby("experiment_id")["n_steps"].first()
    stages = _stage_loads()
    tables = []
    for position, (_, run) in enumerate(experiments().sort_values("experiment_id").iterrows()):
        name = run["experiment_id"]
        rng = np.random.default_rng([seed, position])
        tables.append(_one_run(run, stages[stages["experiment_id"] == name], n_steps or int(published[name]), rng))
    return validate_steps(pd.concat(tables, ignore_index=True), source=f"simulated step rows (seed {seed})")


@dataclass(frozen=True)
class _Load:
    """What each row of a run sees of its load stage; arrays of one value a row."""

    rate_per_us: FloatArray
    served_per_us: FloatArray
    interval_us: FloatArray
    level: FloatArray

    @property
    def served_per_step(self) -> FloatArray:
        return self.served_per_us * self.interval_us


def _stage_loads() -> pd.DataFrame:
    """Rate, step interval and running level of each load stage, from the measured summary figures."""
    figures = measured().pivot_table(index=["experiment_id", "stage"], columns=["metric", "statistic"], values="value")
    table = pd.DataFrame(
        {
            "e2e_ms": figures["e2e", "mean"],
            "ttft_ms": figures["ttft", "mean"],
            "served_per_s": figures["throughput", "requests"],
        }
    ).reset_index()
    return load_stages().merge(table, on=["experiment_id", "stage"])


def _one_run(run: pd.Series, stages: pd.DataFrame, n_steps: int, rng: np.random.Generator) -> pd.DataFrame:
    gaps = rng.geometric(SAMPLED_SHARE, n_steps)
    load = _load_of_rows(run, stages, n_steps)
    elapsed_us = np.cumsum(gaps * load.interval_us * rng.lognormal(0.0, INTERVAL_SIGMA, n_steps))

    running = _running_depth(load.level, run["max_num_seqs"], rng)
    patience = PATIENCE_S * load.rate_per_us * US_PER_S
    backlog = np.minimum(elapsed_us * (load.rate_per_us - load.served_per_us), patience)
    waiting = rng.poisson(backlog + load.served_per_step / 2)
    prefill_reqs, prefill_tokens = _prefills(run, load, running, rng)
    decodes = running - prefill_reqs
    if rng.random() < PURE_PREFILL_SHARE:
        decodes[0] = 0
        running[0] = prefill_reqs[0]
    free = _free_blocks(run, running)
    label_us = _label_us(running, waiting, prefill_reqs, rng)
    start_ns = _start_times_ns(elapsed_us, label_us)
    return pd.DataFrame(
        {
            "experiment_id": run["experiment_id"],
            "model": run["model"],
            "workload": run["workload"],
            "tensor_parallel": run["tensor_parallel"],
            "step_id": np.cumsum(gaps),
            "ts_start_ns": start_ns,
            "ts_end_ns": start_ns + (label_us * _NANOSECONDS_PER_MICROSECOND).astype(np.int64),
            "duration_us": label_us,
            "running_depth": running,
            "waiting_depth": waiting,
            "num_prefill_reqs": prefill_reqs,
            "num_decode_reqs": decodes,
            "prefill_tokens": prefill_tokens,
            "decode_tokens": decodes,
            "num_finished": np.minimum(rng.poisson(load.served_per_step), decodes),
            "num_preempted": np.where(free == 0, rng.poisson(PREEMPTIONS_PER_FULL_STEP, n_steps), 0),
            "kv_blocks_total": run["kv_blocks_total"],
            "kv_blocks_free": free,
        }
    )


def _load_of_rows(run: pd.Series, stages: pd.DataFrame, n_steps: int) -> _Load:
    decode_ms = (stages["e2e_ms"] - stages["ttft_ms"]).to_numpy()
    interval_us = decode_ms / (run["run_output_tokens"] - 1) * _MICROSECONDS_PER_MILLISECOND
    rate = stages["requested_rate_per_s"].to_numpy() / US_PER_S
    served = np.where(run["overloaded"], stages["served_per_s"].to_numpy() / US_PER_S, rate)
    fits_in_kv = run["kv_blocks_total"] / _blocks_per_request(run)
    level = np.minimum(rate * decode_ms * _MICROSECONDS_PER_MILLISECOND, min(run["max_num_seqs"], fits_in_kv))
    share = np.cumsum(stages["duration_s"].to_numpy() / interval_us)
    stage = np.searchsorted(share / share[-1], (np.arange(n_steps) + 0.5) / n_steps)
    return _Load(rate[stage], served[stage], interval_us[stage], level[stage])


def _running_depth(level: FloatArray, most: int, rng: np.random.Generator) -> IntArray:
    """An autoregressive walk whose spread is that of a Poisson number around its level."""
    innovations = rng.standard_normal(len(level)) * np.sqrt(1 - DEPTH_CORRELATION**2)
    walk = np.fromiter(accumulate(innovations, lambda last, new: DEPTH_CORRELATION * last + new), float, len(level))
    return np.clip(np.rint(level + np.sqrt(level) * walk), 1, most).astype(np.int64)


def _prefills(run: pd.Series, load: _Load, running: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Requests that read their prompt and the tokens they compute: mostly the uncached tail of a cached prompt."""
    n_steps = len(running)
    requests = np.minimum(rng.poisson(PREFILL_STEPS_PER_REQUEST * load.served_per_step), running - 1)
    tokens = requests + rng.binomial(requests * (UNCACHED_TOKENS_MAX - 1), 0.5)
    prompt = run["run_system_prompt_tokens"] + run["run_question_tokens"]
    later = rng.permutation(np.arange(1, min(n_steps, LARGE_PREFILL_WITHIN)))
    large = np.concatenate([[0], later])[:LARGE_PREFILLS]
    room = run["max_num_batched_tokens"] - running[large]
    large_tokens = rng.integers(LARGE_PREFILL_TOKENS_MIN, room)
    tokens[large] = large_tokens
    requests[large] = -(-large_tokens // prompt)
    running[large] = np.maximum(running[large], requests[large])
    return requests, tokens


def _blocks_per_request(run: pd.Series) -> float:
    """KV blocks of a request halfway through its output."""
    tokens = run["run_system_prompt_tokens"] + run["run_question_tokens"] + run["run_output_tokens"] / 2
    return tokens / run["block_size"]


def _free_blocks(run: pd.Series, running: IntArray) -> IntArray:
    used = np.ceil(running * _blocks_per_request(run)).astype(np.int64)
    return np.maximum(run["kv_blocks_total"] - used, 0)


def _label_us(running: IntArray, waiting: IntArray, prefill_reqs: IntArray, rng: np.random.Generator) -> FloatArray:
    contention = rng.uniform(0.0, CONTENTION_PER_REQUEST_MAX) * np.maximum(running - CONTENTION_ABOVE, 0)
    cost = (BASE_COST_US + RUNNING_COST_US * running) * (1.0 + contention)
    cost = cost + WAITING_COST_US * waiting + PREFILL_COST_US * prefill_reqs
    return np.maximum(np.rint(cost * rng.lognormal(0.0, LABEL_SIGMA, len(running))), SHORTEST_LABEL_US)


def _start_times_ns(elapsed_us: FloatArray, label_us: FloatArray) -> IntArray:
    """Start times that never precede the end of the step before."""
    between = np.diff(elapsed_us, prepend=0.0)
    between[1:] = np.maximum(between[1:], label_us[:-1])
    return (np.cumsum(between) * _NANOSECONDS_PER_MICROSECOND).astype(np.int64)
