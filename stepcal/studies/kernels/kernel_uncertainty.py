"""The study ``kernel_uncertainty``: models left out one at a time, and intervals that know the model's error.

A model's error is not the noise of a fit. An interval here adds, independently, what each kernel's table leaves unexplained,
weighed by its share of the step, and what runs of models that were left out of the fit are missed by. A queue amplifies a
relative error of step time; by how much is simulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from stepcal.calibration.closed_loop import SIGMA_LATENCY, SIGMA_OVERLOADED, prepare_runs
from stepcal.calibration.robust import ROBUST_SIGMAS
from stepcal.experiments.experiment import Experiment
from stepcal.experiments.latencies import WHOLE, measured_latencies
from stepcal.kernels import load_kernels
from stepcal.kernels.forms import DECODE_ATTENTION, EXPERTS, GEMM
from stepcal.metrics import CONFIDENCE
from stepcal.simulator import CompiledStepTime, RequestList, StepBatch, simulate
from stepcal.step_time.coefficients import DEFAULT, load_coefficients
from stepcal.step_time.kernel_model import compile_kernels, kernel_components_us
from stepcal.step_time.kernel_parameters import KERNEL_PARAMETERS
from stepcal.step_time.physical_parameters import as_array, by_name
from stepcal.studies.kernels.kernel_transfer import group_of
from stepcal.studies.kernels.transfer import transfer_cases
from stepcal.studies.published_runs import load_experiments
from stepcal.studies.study import Tables
from stepcal.units import MS_PER_S, PERCENT, US_PER_S, BoolArray, FloatArray

SLOWER = 1.02
"""Factor on the step time by which the amplification of a queue is simulated."""
LOG_STEP = 4e-3
"""Step of finite differences in the logarithm, as in the calibration."""
PRODUCTS_OF_A_LAYER = 4
"""Products of different shapes whose residuals average out."""
GUESSED_LOG_SD = 0.3
"""Error of what no vLLM table has: the sampler's sort, small kernels, and all-reduces on top of their table's noise."""
ALL_REDUCE_LOG_SD = 0.1
"""Spread between the tables of three versions of vLLM for messages of a decode step."""
GPU_TABLES = ("tokens_us", "prefill_tokens_us", "requests_us", "decode_requests_us")
GPU_NUMBERS = ("constant_us", "kv_us", "prefill_kv_us", "prefill_pair_us")
"""What the kernel model's GPU takes, as tables and as single numbers; the host's terms are others."""
FITTED = "the 16"
UNSEEN = "the 31"


@dataclass(frozen=True)
class Observed:
    """A run with the requests to simulate, and the figures that a fit or a judgement looks at, by stage.

    Attributes
    ----------
    sample : str
        `FITTED` or `UNSEEN`.
    targets : tuple of (BoolArray, dict)
        Which requests of the run, and their measured means in seconds.
    whole_e2e_s : float
        Measured mean E2E of the whole run.
    """

    sample: str
    experiment: Experiment
    requests: RequestList
    targets: tuple[tuple[BoolArray, dict[str, float]], ...]
    whole_e2e_s: float

    @property
    def model(self) -> tuple[int, ...]:
        """What makes two runs runs of one model, whatever it is called."""
        a = self.experiment.architecture
        return (a.hidden_size, a.num_layers, a.num_kv_heads, a.intermediate_size, a.num_experts, a.vocab_size)


def run_kernel_uncertainty(
    requests: pd.DataFrame, runs: pd.DataFrame, measured: pd.DataFrame
) -> tuple[Tables, dict[str, str]]:
    """Leave each model out of a fit to the 16 and the 25 H100 runs with 16-bit weights, and score intervals on all 47.

    Each fit is one Gauss-Newton step from the frozen parameters; the runs that were left out are then simulated.

    Parameters
    ----------
    requests : DataFrame
        Measured requests of the 16.
    runs, measured : DataFrame
        ``transfer/runs.csv`` and ``transfer/measured.csv``.

    Returns
    -------
    tables : dict
        ``left_out`` (signed error of mean E2E of each run whose model was left out), ``intervals`` (of each of the 47 runs:
        prediction, bounds, measurement, and what the width is made of).
    texts : dict
        ``left_out_log_sd``: error of models left out of the 16, which the intervals take.
    """
    del runs, measured  # named because the recording depends on them
    observed = [*observed_of_the_16(requests), *observed_of_the_31()]
    values = load_coefficients(DEFAULT).values
    fittable = [o for o in observed if o.sample == FITTED or group_of(o.experiment.deployment) == "H100, 16-bit"]
    both = left_out_errors(fittable, values)
    only_16 = [o for o in observed if o.sample == FITTED]
    spread = left_out_log_sd(only_16, left_out_errors(only_16, values), values)
    return {"left_out": both, "intervals": intervals(observed, values, spread)}, {"left_out_log_sd": f"{spread:.4f}"}


def left_out_log_sd(observed: Sequence[Observed], errors: pd.DataFrame, values: Mapping[str, float]) -> float:
    """Return by what the step time of runs whose model was left out is missed: their E2E errors less the queue's part."""
    by_run = errors.set_index("experiment_id")["error_percent"]
    logs = [
        np.log1p(by_run[o.experiment.experiment_id] / PERCENT) / max(amplification_of(o, values)[1], 1.0)
        for o in observed
    ]
    return float(np.sqrt(np.mean(np.square(logs))))


def amplification_of(o: Observed, values: Mapping[str, float]) -> tuple[float, float]:
    """Return a run's predicted mean E2E in seconds, and by how many percent it grows if each step takes 1% longer."""
    step_time = compile_kernels(values, o.experiment.deployment)
    e2e, slower = (float(np.nanmean(_simulated_s(o, scaled(step_time, factor), values)[0])) for factor in (1.0, SLOWER))
    return e2e, max(float(np.log(slower / e2e) / np.log(SLOWER)), 0.0)


def observed_of_the_16(requests: pd.DataFrame) -> list[Observed]:
    """The 16 with their replayed arrivals and training targets."""
    result = []
    for run in prepare_runs(load_experiments(requests)):
        targets = tuple((t.chosen, t.values) for t in run.targets)
        table = measured_latencies(run.experiment).set_index(["split", "metric", "statistic"])["value"]
        result.append(Observed(FITTED, run.experiment, run.requests, targets, table[WHOLE, "e2e", "mean"] / MS_PER_S))
    return result


def observed_of_the_31() -> list[Observed]:
    """The 31 with Poisson arrivals of one seed and their stages' measured means."""
    result = []
    for experiment, known in transfer_cases():
        requests = experiment.arrivals("poisson", seed=0)
        stage, means = np.asarray(requests.stage), known[known["statistic"] == "mean"].set_index(["split", "metric"])
        value = means["value"] / MS_PER_S
        targets = []
        for s in np.unique(stage):
            split = f"stage {s}" if f"stage {s}" in set(known["split"]) else WHOLE
            targets.append((stage == s, {m: float(value[split, m]) for m in ("e2e", "ttft", "tpot")}))
        result.append(Observed(UNSEEN, experiment, requests, tuple(targets), float(value[WHOLE, "e2e"])))
    return result


def _simulated_s(
    o: Observed, step_time: CompiledStepTime, values: Mapping[str, float]
) -> tuple[FloatArray, FloatArray]:
    """E2E and TTFT of each request, NaN where it did not complete."""
    result = simulate(
        o.requests,
        o.experiment.server,
        step_time,
        timeout_s=o.experiment.workload.timeout_s,
        api_before_us=values["api_before_us"],
    )
    e2e = result.e2e_us() / US_PER_S
    return e2e, np.where(np.isnan(e2e), np.nan, result.ttft_us() / US_PER_S)


def _log_figures(o: Observed, values: Mapping[str, float]) -> FloatArray:
    """Logarithms of predicted over measured, whitened, target by target."""
    e2e, ttft = _simulated_s(o, compile_kernels(values, o.experiment.deployment), values)
    sigmas = SIGMA_OVERLOADED if o.experiment.overloaded else SIGMA_LATENCY
    rows = []
    for chosen, known in o.targets:
        done = chosen & ~np.isnan(e2e)
        mean = {"e2e": e2e[done].mean(), "ttft": ttft[done].mean(), "completed": float(done.sum())}
        mean["tpot"] = (e2e[done] - ttft[done]).mean() / (o.experiment.workload.output_len - 1)
        rows += [np.log(mean[name] / known[name]) / sigma for name, sigma in sigmas.items()]
    return np.array(rows)


def left_out_errors(observed: Sequence[Observed], values: Mapping[str, float]) -> pd.DataFrame:
    """Fit without each model by one Gauss-Newton step, and simulate its runs.

    Parameters
    ----------
    observed : sequence of Observed
    values : mapping of str to float
        Where the step starts.

    Returns
    -------
    DataFrame
        `sample`, `experiment_id`, `overloaded`, `error_percent` (signed, mean E2E of the whole run).
    """
    x = np.log(as_array(values, KERNEL_PARAMETERS))
    prior = np.log([p.start for p in KERNEL_PARAMETERS])
    precision = np.diag([p.prior_log_sd**-2.0 for p in KERNEL_PARAMETERS])
    base = [_log_figures(o, values) for o in observed]
    slopes = [_slopes(o, x, own) for o, own in zip(observed, base, strict=True)]
    rows = []
    for model in dict.fromkeys(o.model for o in observed):
        kept = [i for i, o in enumerate(observed) if o.model != model]
        jacobian, residual = np.vstack([slopes[i] for i in kept]), np.concatenate([base[i] for i in kept])
        weight = 1.0 / np.maximum(1.0, np.abs(residual) / ROBUST_SIGMAS)
        normal = jacobian.T @ (weight[:, None] * jacobian) + precision
        step = np.linalg.solve(normal, jacobian.T @ (weight * residual) + precision @ (x - prior))
        fitted = by_name(np.exp(x - step), KERNEL_PARAMETERS)
        rows += [_judged(o, fitted) for o in observed if o.model == model]
    return pd.DataFrame(rows)


def _slopes(o: Observed, x: FloatArray, base: FloatArray) -> FloatArray:
    moved = [by_name(np.exp(x + LOG_STEP * (np.arange(x.size) == j)), KERNEL_PARAMETERS) for j in range(x.size)]
    return np.column_stack([(_log_figures(o, values) - base) / LOG_STEP for values in moved])


def _judged(o: Observed, values: Mapping[str, float]) -> dict[str, object]:
    e2e, _ = _simulated_s(o, compile_kernels(values, o.experiment.deployment), values)
    return {
        "sample": o.sample,
        "experiment_id": o.experiment.experiment_id,
        "overloaded": o.experiment.overloaded,
        "error_percent": PERCENT * (float(np.nanmean(e2e)) / o.whole_e2e_s - 1.0),
    }


def intervals(observed: Sequence[Observed], values: Mapping[str, float], spread: float) -> pd.DataFrame:
    """Return the interval of each run's mean E2E, with what its width is made of.

    Parameters
    ----------
    observed : sequence of Observed
    values : mapping of str to float
    spread : float
        Error of the step time of models that were left out (`left_out_log_sd`).

    Returns
    -------
    DataFrame
        `sample`, `experiment_id`, `group`, `predicted_ms`, `low_ms`, `high_ms`, `measured_ms`, `kernel_log_sd`,
        `left_out_log_sd`, `amplification` (of a relative error of step time), `is_inside`.
    """
    rows = []
    for o in observed:
        deployment = o.experiment.deployment
        e2e, amplification = amplification_of(o, values)
        kernel = kernel_log_sd(o, e2e, values)
        sd = amplification * float(np.hypot(kernel, spread))
        low, high = e2e * np.exp(np.array([-1.0, 1.0]) * _normal_quantile() * sd)
        rows.append(
            {
                "sample": o.sample,
                "experiment_id": o.experiment.experiment_id,
                "group": group_of(deployment),
                "predicted_ms": e2e * MS_PER_S,
                "low_ms": low * MS_PER_S,
                "high_ms": high * MS_PER_S,
                "measured_ms": o.whole_e2e_s * MS_PER_S,
                "kernel_log_sd": kernel,
                "left_out_log_sd": spread,
                "amplification": amplification,
                "is_inside": bool(low <= o.whole_e2e_s <= high),
            }
        )
    return pd.DataFrame(rows)


def _normal_quantile() -> float:
    from scipy.stats import norm

    return float(norm.ppf(0.5 + CONFIDENCE / 2))


def scaled(step_time: CompiledStepTime, factor: float) -> CompiledStepTime:
    """Return a step time whose GPU takes longer by a factor; the host's stays."""
    tables: dict[str, Any] = {name: np.asarray(getattr(step_time, name)) * factor for name in GPU_TABLES}
    numbers: dict[str, Any] = {name: getattr(step_time, name) * factor for name in GPU_NUMBERS}
    return replace(step_time, **tables, **numbers)


def kernel_log_sd(o: Observed, e2e_s: float, values: Mapping[str, float]) -> float:
    """Return the relative error of a run's step time that its kernels' residuals add up to, each by its share.

    The batch is that of the mean rate by Little's law, decoding requests half way through their answers.
    """
    deployment, workload = o.experiment.deployment, o.experiment.workload
    rate = len(o.requests) / float(o.requests.arrival_s[-1])
    running = int(np.clip(round(rate * e2e_s), 1, deployment.limits.max_num_seqs))
    context = workload.prompt_len + workload.output_len // 2
    nothing = np.zeros(0, dtype=np.int32)
    batch = StepBatch(nothing, nothing, np.full(running, context, dtype=np.int32), waiting=0)
    parts = kernel_components_us(values, deployment, batch)
    kernels, own = load_kernels(deployment.accelerator), deployment.architecture
    precision = "fp8" if own.weight_dtype == "fp8" else "bf16"
    products = kernels.of(EXPERTS if own.num_moe_layers else GEMM, precision).residual_log_sd
    shapes = 1 if own.num_moe_layers else PRODUCTS_OF_A_LAYER
    sds = {
        "products": products / np.sqrt(shapes),
        "head": kernels.of(GEMM, "bf16").residual_log_sd,
        "attention": kernels.of(DECODE_ATTENTION, "bf16").residual_log_sd,
        "small kernels": GUESSED_LOG_SD,
        "all-reduces": ALL_REDUCE_LOG_SD,
        "sampler": GUESSED_LOG_SD,
        "mixed step": 0.0,
    }
    total = sum(parts.values())
    return float(np.sqrt(sum((parts[name] / total * sds[name]) ** 2 for name in parts)))


def coverage(table: pd.DataFrame) -> pd.DataFrame:
    """Return how many measurements lie inside their intervals, by sample and group, and the median half width.

    Parameters
    ----------
    table : DataFrame
        Of `intervals`.

    Returns
    -------
    DataFrame
        `sample`, `group`, `runs`, `inside`, `share_percent`, `half_width_percent`.
    """
    width = PERCENT * (np.sqrt(table["high_ms"] / table["low_ms"]) - 1.0)
    own = table.assign(width=width)
    rows = []
    for (sample, group), part in [*own.groupby(["sample", "group"]), (("all", "all"), own)]:
        inside = int(part["is_inside"].sum())
        share, half = PERCENT * inside / len(part), float(part["width"].median())
        rows.append((sample, group, len(part), inside, share, half))
    return pd.DataFrame(rows, columns=["sample", "group", "runs", "inside", "share_percent", "half_width_percent"])
