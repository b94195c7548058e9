"""Which pool of offloaded KV blocks explains the label's jumps, found from traces of ``schedule()`` alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.optimize import OptimizeResult, least_squares

from stepcal.reconstruction.prefix_cache import groups_seen
from stepcal.specs.architecture import ModelArchitecture, load_architecture
from stepcal.specs.kv_offloading import offload_blocks, rejected_requests
from stepcal.units import FloatArray, IntArray

ALL, PROMPTS = "all", "prompts"
"""Which full blocks of a request are stored."""
POOL_GRID_GIB = np.round(np.arange(4.0, 16.05, 0.1), 1)
CONVERGED = 1e-14
N_PIECES = 20
"""Contiguous pieces of a run that are drawn anew for an interval: neighbouring steps are much alike."""
N_DRAWS = 500


def fit_pool(
    steps: pd.DataFrame, experiments: pd.DataFrame, prompt_tokens: pd.Series, *, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Find the pool that explains the label best, each trace on its own, if all blocks are stored or prompts alone.

    For each size of `POOL_GRID_GIB` the label is fitted by ``t R + k X P``, least squares of log ratios, with t and k free.
    The interval is of the best size when contiguous pieces of the run are drawn anew.

    Parameters
    ----------
    steps : DataFrame
        Training rows.
    experiments : DataFrame
        Rows of ``experiments.csv``.
    prompt_tokens : Series
        Typical length of a prompt, by experiment.
    seed : int

    Returns
    -------
    fits : DataFrame
        `experiment_id`, `stored` (`ALL` or `PROMPTS`), `n_steps`, `n_above` (steps with more blocks to store than the best
        pool has), `pool_gib`, `low_gib`, `high_gib` (95%), `pool_blocks`, `request_us` (t), `scan_us` (k times P, a
        rejection), `log_rms`, `log_rms_no_pool`.
    profile : DataFrame
        `experiment_id`, `stored`, `pool_gib`, `log_rms`.
    """
    rng, fits, profile = np.random.default_rng(seed), [], []
    drawn = rng.integers(0, N_PIECES, size=(N_DRAWS, N_PIECES))
    chosen = with_held_blocks(steps[(steps["prefill_tokens"] == 0) & (steps["running_depth"] > 0)])
    for experiment, run in chosen.groupby("experiment_id", sort=True):
        own, setting = run.sort_values("step_id"), experiments[experiments["experiment_id"] == experiment].iloc[0]
        pools = np.array([offload_blocks(architecture_of(own), float(gib)) for gib in POOL_GRID_GIB])
        to_store = {
            ALL: (own["full_blocks"].to_numpy(dtype=float), float(setting["run_output_tokens"])),
            PROMPTS: (_prompt_blocks(own["running_depth"], setting, float(prompt_tokens[experiment])), 0.0),
        }
        label, running = (own[c].to_numpy(dtype=float) for c in ("duration_us", "running_depth"))
        for stored, (blocks, output) in to_store.items():
            results = [
                _fit_scan(label, running, rejected_requests(running, blocks, output, pool_blocks=int(pool)))
                for pool in pools
            ]
            squares = np.array([np.square(r.fun) for r in results])
            about = {"experiment_id": experiment, "stored": stored, "n_steps": len(own)}
            without = {"log_rms_no_pool": float(np.std(np.log(label / running)))}
            fits.append(about | _best_pool(pools, blocks, results, squares, drawn) | without)
            rows = {"experiment_id": experiment, "stored": stored, "pool_gib": POOL_GRID_GIB}
            profile.append(pd.DataFrame({**rows, "log_rms": np.sqrt(squares.sum(axis=1) / len(own))}))
    return pd.DataFrame(fits), pd.concat(profile, ignore_index=True)


def _best_pool(
    pools: FloatArray,
    blocks: FloatArray,
    results: list[OptimizeResult],
    squares: FloatArray,
    drawn: IntArray,
) -> dict[str, float | int]:
    """Return the pool whose squared log ratios, a row a pool, are least, with its interval over pieces of the run."""
    total = squares.sum(axis=1)
    best = int(np.argmin(total))
    pieces = np.array([piece.sum(axis=1) for piece in np.array_split(squares, N_PIECES, axis=1)])
    low, high = np.percentile(POOL_GRID_GIB[np.argmin(pieces[drawn].sum(axis=1), axis=1)], [2.5, 97.5])
    return {
        "n_above": int((blocks > pools[best]).sum()),
        "pool_gib": float(POOL_GRID_GIB[best]),
        "low_gib": float(low),
        "high_gib": float(high),
        "pool_blocks": int(pools[best]),
        "request_us": float(np.exp(results[best].x[0])),
        "scan_us": float(np.exp(results[best].x[1])),
        "log_rms": float(np.sqrt(total[best] / squares.shape[1])),
    }


def with_held_blocks(steps: pd.DataFrame) -> pd.DataFrame:
    """Blocks in use, and those of them that are full: each running request has one that is not, and is not stored yet."""
    held = steps["kv_blocks_total"] - steps["kv_blocks_free"]
    return steps.assign(held_blocks=held, full_blocks=np.maximum(held - steps["running_depth"], 0))


def architecture_of(steps: pd.DataFrame) -> ModelArchitecture:
    """Return the model that the steps of one run are of."""
    return load_architecture(str(steps["model"].iloc[0]))


def _prompt_blocks(running: pd.Series, setting: pd.Series, prompt_tokens: float) -> FloatArray:
    """Different full blocks of the prompts of running requests, which cycle through the texts of the workload."""
    groups, texts = float(setting["run_groups"]), float(setting["run_groups"] * setting["run_prompts_per_group"])
    n = np.minimum(running.to_numpy(dtype=float), texts)
    system = np.floor(float(setting["run_system_prompt_tokens"]) / setting["block_size"])
    own = np.floor(prompt_tokens / setting["block_size"]) - system
    return np.asarray(n * own + system * groups_seen(n, groups, texts / groups))


def _fit_scan(label: FloatArray, running: FloatArray, rejected: FloatArray) -> OptimizeResult:
    """Least squares of log label; x = logs of microseconds a request and a rejection."""

    def residuals(x: FloatArray) -> FloatArray:
        return np.asarray(np.log((np.exp(x[0]) * running + np.exp(x[1]) * rejected) / label))

    until = dict.fromkeys(("xtol", "ftol", "gtol"), CONVERGED)
    return least_squares(residuals, [np.log(7.0), np.log(100.0)], bounds=([0.0, 0.0], [5.0, 8.0]), **until)
