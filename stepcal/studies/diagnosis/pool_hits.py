"""What the pool in CPU memory could give back: prompt tokens that the GPU's own prefix cache did not have.

The simulator loads nothing from the pool. What that leaves out is counted here for the 16 runs, from above: a pool without
bounds that has every block of every prompt and output so far, and loads that take no time. Where the GPU's cache has all
prompts by itself, nothing is left for the pool to give.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from stepcal.experiments.experiment import Experiment, run_experiment
from stepcal.simulator.load.workload import RequestList
from stepcal.simulator.result import SimulationResult
from stepcal.step_time.coefficients import DEFAULT, load_coefficients
from stepcal.units import PERCENT, IntArray

LARGE_STEP_TOKENS = 256
"""Beyond it a further prompt token costs the same, whatever the batch: the weights have been read."""


def pool_hits(experiments: list[Experiment]) -> pd.DataFrame:
    """Return what the pool could give back at most, by run, simulated without it.

    Parameters
    ----------
    experiments : list of Experiment
        The 16 runs.

    Returns
    -------
    DataFrame
        `experiment_id`, `overloaded`, `admitted` (first admissions), `preemptions`, `prompt_tokens` (of first admissions),
        `gpu_hit_tokens` and `pool_hit_tokens` of these, `resumed_tokens` (recomputed after a preemption),
        `saved_percent` (time of all steps that these hits and tokens take).
    """
    coefficients, rows = load_coefficients(DEFAULT), []
    for experiment in experiments:
        step_time = coefficients.of_experiment(experiment.experiment_id).compile(experiment.deployment)
        result = run_experiment(
            experiment,
            step_time,
            process=experiment.default_process,
            seed=0,
            record_steps=1.0,
            **coefficients.api_overheads_us(),
        )
        counts = count_hits(result, experiment.server.block_size)
        by_tokens = np.asarray(step_time.tokens_us)
        token_us = (by_tokens[-1] - by_tokens[LARGE_STEP_TOKENS]) / (by_tokens.size - 1 - LARGE_STEP_TOKENS)
        assert result.step_rows is not None
        busy_us = float((result.step_rows.steps["end_us"] - result.step_rows.steps["start_us"]).sum())
        saved = counts["pool_hit_tokens"] + counts["resumed_tokens"]
        rows.append(
            {
                "experiment_id": experiment.experiment_id,
                "overloaded": experiment.overloaded,
                **counts,
                "saved_percent": PERCENT * saved * float(token_us) / busy_us,
            }
        )
    return pd.DataFrame(rows)


def count_hits(result: SimulationResult, block_size: int) -> dict[str, Any]:
    """Count, over all admissions of a run with recorded steps, tokens that were hits and tokens that could have been.

    Parameters
    ----------
    result : SimulationResult
        Simulated with ``record_steps=1``.
    block_size : int
        Tokens of a KV block; hits are whole blocks.

    Returns
    -------
    dict
        ``admitted``, ``preemptions``, ``prompt_tokens``, ``gpu_hit_tokens``, ``pool_hit_tokens``, ``resumed_tokens``.
    """
    rows = result.step_rows
    if rows is None:
        raise ValueError("the result has no recorded steps; simulate with record_steps=1")
    prompt = prompt_tokens(result.requests)
    prefixes = [_prefixes(result.requests, request) for request in range(prompt.size)]
    known: set[tuple[tuple[int, int], ...]] = set()
    n_outputs, is_admitted = np.zeros(prompt.size, dtype=int), np.zeros(prompt.size, dtype=bool)
    counts = dict.fromkeys(("prompt_tokens", "gpu_hit_tokens", "pool_hit_tokens", "resumed_tokens"), 0)
    item = admission = 0
    for items_end, admissions_end in rows.steps[["items_end", "cached_end"]].tolist():
        for k in range(admission, admissions_end):
            request, hit = int(rows.cached_request[k]), int(rows.cached_tokens[k])
            if is_admitted[request]:
                counts["resumed_tokens"] += int(prompt[request] + n_outputs[request]) - hit
                continue
            is_admitted[request] = True
            seen = max((n for key, n in prefixes[request] if key in known), default=0)
            whole = min(seen, int(prompt[request]) - 1) // block_size * block_size
            counts["prompt_tokens"] += int(prompt[request])
            counts["gpu_hit_tokens"] += hit
            counts["pool_hit_tokens"] += max(0, whole - hit)
            known.update(key for key, _ in prefixes[request])
        own = rows.item_request[item:items_end]
        np.add.at(n_outputs, own[rows.item_kv[item:items_end] >= prompt[own]], 1)
        item, admission = items_end, admissions_end
    return {"admitted": int(is_admitted.sum()), "preemptions": result.preemptions, **counts}


def prompt_tokens(requests: RequestList) -> IntArray:
    """Tokens of each request's prompt, shape (n_requests,)."""
    ends = np.concatenate([[0], np.cumsum(requests.segment_tokens)])
    by_prompt = ends[requests.prompt_start[1:]] - ends[requests.prompt_start[:-1]]
    return np.asarray(by_prompt[requests.prompt])


def _prefixes(requests: RequestList, request: int) -> list[tuple[tuple[tuple[int, int], ...], int]]:
    """Beginnings of a request's prompt, each as its segments and its tokens."""
    own = slice(*requests.prompt_start[requests.prompt[request] : requests.prompt[request] + 2])
    segments = list(zip(requests.segment_content[own].tolist(), requests.segment_tokens[own].tolist(), strict=True))
    return [(tuple(segments[: i + 1]), sum(n for _, n in segments[: i + 1])) for i in range(len(segments))]
