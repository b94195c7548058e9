"""A controlled experiment: servers simulated on a known step time, fitted with the right data and with single faults.

The truth is the physical model at `TRUTH`; labels carry noise of `LABEL_NOISE`. A fit minimises relative errors without
priors, so that nothing but the data recovers the truth; it knows the model's form, so what is tested is the data and not the
form. Everything here is simulated and enters no verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.optimize import nnls
from scipy.stats import norm
from threadpoolctl import threadpool_limits

from stepcal.experiments.experiment import Experiment
from stepcal.metrics import CONFIDENCE, mape_percent
from stepcal.simulator import SimulationResult, simulate
from stepcal.step_time.physical import PhysicalFeatures, PhysicalModel, compile_physical, physical_features
from stepcal.step_time.physical_parameters import STEP_PARAMETERS, as_array, by_name, priors
from stepcal.studies.published_runs import load_experiments
from stepcal.units import NS_PER_US, PERCENT, FloatArray

Generator = np.random.Generator
LEARNED = tuple(p for p in STEP_PARAMETERS if p.name != "offload_scan_us")
"""All but the scan of an offload pool, which the simulated servers do not have."""
TRUTH = {
    "hbm_read_factor": 1.06,
    "kv_block_ns": 3.0,
    "layer_us": 54.0,
    "mixture_layer_us": 28.0,
    "collective_us": 3.5,
    "collective_bytes_factor": 1.7,
    "request_us": 7.0,
    "mixed_layer_us": 8.0,
    "offload_scan_us": 0.085,
}
"""Rounded from a fit to the request labels of the 16 runs."""
API_BEFORE_US = 6_000.0
"""Time outside the engine, the same in truth and prediction."""
SERVERS = (
    "20260217-231439-llama-2-7b-tp1-general",
    "20260217-202857-llama-2-70b-tp4-general",
    "20260218-130541-mixtral-8x7b-v0-1-tp2-general",
    "20260218-150304-codellama-34b-tp2-general",
    "20260218-160939-codellama-34b-tp2-reasoning",
)
"""Each model once, and an overloaded run, whose batch is always full and whose contexts are long."""
SHORTENED = 4
"""Each stage of load lasts this fraction of the real one's time."""
STEPS_PER_SERVER = 2_000
"""Steps that a fit sees of a server: consecutive ones are nearly copies, so they are drawn at random."""
LABEL_NOISE = 0.02
"""Relative noise of a label: scatter of the traces' intervals about a line (1.5-1.9%)."""
HEAVY_NOISE = 0.20
"""The fault `noise`: ten times as much."""
HOST_LABEL_US = 7.0
"""Published label per running request (page on the label)."""
SAMPLED_SHARE = 0.1
"""Share of steps that the public traces hold."""
ITERATIONS = 6
"""Gauss-Newton steps; the third changes nothing where the label can be fitted."""
SEEDS = 20
JUDGED_SEEDS = 3
"""Seeds whose fits run closed loop: the E2E error hardly depends on the seed."""
JUDGED_OFFSET = 1_000
"""Added to a seed for arrivals that no fit saw."""
LIMIT_PERCENT = 10.0
"""E2E mean error at which the study's criterion turns."""
NONE = "none"
FAULTS = {
    NONE: "right label, contexts known per request",
    "wrong_label": "label is the scheduler's CPU time",
    "no_decode_attention": "decode attention set to zero",
    "kv_sums_only": "only batch sums of the contexts known",
    "kv_hidden": "contexts hidden: each request's taken as prompt plus half its output",
    "sampling": "one step in ten sampled, label averaged over the gap",
    "noise": "label noise ten times as large",
    "as_the_study": "wrong label, no decode attention and one step in ten together",
}
"""What a fit is given, in words."""
CACHED_PROMPTS, NEW_PROMPTS = "prompts mostly cached, as run", "no prompt seen before"
NEW_PROMPT_COUNT = 4_000
"""More prompts than requests; they share nothing."""
STAGE_SHARE = 8
"""Each load stage of the simulated servers lasts this fraction of the real one's time."""


@dataclass(frozen=True)
class KnownSteps:
    """Simulated steps of one server: features with the contexts of each request, and the step time that is true (us)."""

    experiment: Experiment
    table: pd.DataFrame
    features: PhysicalFeatures
    true_us: FloatArray


@dataclass(frozen=True)
class Recovered:
    """A fit's parameters and their standard errors, by name."""

    values: dict[str, float]
    standard_errors: dict[str, float]


@threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]
def run_controlled(
    seeds: Sequence[int] = tuple(range(SEEDS)),
    *,
    judged_seeds: int = JUDGED_SEEDS,
    servers: Sequence[str] = SERVERS,
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Simulate, fit with each fault, and compare with the truth.

    Parameters
    ----------
    seeds : sequence of int
        One simulation of all servers and one fit a fault for each.
    judged_seeds : int
        The first so many are judged closed loop too, under new Poisson arrivals.
    servers : sequence of str
        Of the 16 experiments.

    Returns
    -------
    tables : dict
        ``parameters`` (a row a fault and number: `truth`, `estimate` (mean over seeds), `error_percent` (mean absolute),
        `coverage_percent` of the 95% interval), ``faults`` (a row a fault: `parameter_error_percent` (median over numbers),
        `coverage_percent`, `step_mape_percent` against the true step time, `e2e_error_percent` (mean of absolute errors of
        the mean E2E over servers and seeds), `worst_e2e_percent`, `n_below_10`, `n_judged`, `holds`), ``end_to_end`` (a row
        a fault, seed and server).
    texts : dict
        Empty.
    """
    by_name = {e.experiment_id: _shortened(e) for e in load_experiments()}
    chosen = [by_name[name] for name in servers]
    fits, judged = [], []
    for position, seed in enumerate(seeds):
        known = [known_steps(e, seed) for e in chosen]
        unseen = [known_steps(e, seed + JUDGED_OFFSET) for e in chosen] if position < judged_seeds else []
        for fault in FAULTS:
            fitted = recover(known, fault, np.random.default_rng((seed, list(FAULTS).index(fault))))
            fits += [
                {
                    "fault": fault,
                    "seed": seed,
                    "name": p.name,
                    "unit": p.unit,
                    "truth": TRUTH[p.name],
                    "estimate": fitted.values[p.name],
                    "se": fitted.standard_errors[p.name],
                }
                for p in LEARNED
            ]
            judged += [
                {
                    "fault": fault,
                    "seed": seed,
                    "experiment_id": u.experiment.experiment_id,
                    **judge(u, fitted.values, seed),
                }
                for u in unseen
            ]
    parameters, end_to_end = _parameters(pd.DataFrame(fits)), pd.DataFrame(judged)
    return {"parameters": parameters, "faults": _faults(parameters, end_to_end), "end_to_end": end_to_end}, {}


def known_steps(experiment: Experiment, seed: int) -> KnownSteps:
    """Simulate a server under Poisson arrivals on the true clock and keep every step that has work."""
    result = _run(experiment, TRUTH, seed, record=True)
    table = result.step_table().to_pandas()
    table["prefill_pairs"] = 0.0
    prefills = table[table["prefill_tokens"] > 0]
    table.loc[prefills.index, "prefill_pairs"] = [
        float(np.sum(chunk.astype(float) * (context - chunk) + chunk.astype(float) * (chunk + 1) / 2))
        for chunk, context in zip(prefills["prefill_chunk_tokens"], prefills["prefill_kv_lens"], strict=True)
    ]
    has_work = (table["prefill_tokens"] + table["decode_tokens"]) > 0
    table = table[has_work].reset_index(drop=True)
    features = table_features(table, experiment)
    return KnownSteps(experiment, table, features, PhysicalModel().predict_us(TRUTH, features))


def recover(known: Sequence[KnownSteps], fault: str, rng: Generator) -> Recovered:
    """Fit the learned numbers to simulated steps that have one fault (of `FAULTS`)."""
    labels, parts = [], []
    for server in known:
        label, features = _faulty(server, fault, rng)
        labels.append(label)
        parts.append(features)
    return fit_steps(PhysicalFeatures.joined(parts), np.concatenate(labels))


def fit_steps(features: PhysicalFeatures, label_us: FloatArray) -> Recovered:
    """Fit nonnegative numbers by least squares of errors relative to the prediction, with standard errors.

    Errors relative to the label would be biased towards small labels. Gauss-Newton; the prediction is linear but for the
    maximum of reading weights and computing. The host's term is left out.
    """
    model, free = PhysicalModel(), replace(features, schedule_us=np.zeros(len(features)))
    values, scale = priors(STEP_PARAMETERS), label_us

    def design_of(values: Mapping[str, float]) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Gradient and residual relative to the scale, and the norm of each column, 1 for an empty one."""
        gradient = model.gradient_us(values, free)
        design = np.column_stack([gradient[p.name] for p in STEP_PARAMETERS]) / scale[:, None]
        size = np.linalg.norm(design, axis=0)
        return design, (label_us - model.predict_us(values, free)) / scale, np.where(size == 0, 1.0, size)

    for _ in range(ITERATIONS):
        design, residual, size = design_of(values)
        target = residual + design @ as_array(values, STEP_PARAMETERS)
        values = by_name(nnls(design / size, target)[0] / size, STEP_PARAMETERS)
        scale = np.maximum(model.predict_us(values, free), 1.0)
    design, residual, size = design_of(values)
    variance = residual @ residual / (residual.size - size.size)
    covariance = variance * np.linalg.pinv((design / size).T @ (design / size))
    errors = np.sqrt(np.maximum(np.diag(covariance), 0.0)) / size
    return Recovered(values, by_name(errors, STEP_PARAMETERS))


def judge(unseen: KnownSteps, values: Mapping[str, float], seed: int) -> dict[str, float]:
    """Return the step MAPE against the true step time and the error of the mean E2E, closed loop, on new arrivals."""
    truth = np.nanmean(_run(unseen.experiment, TRUTH, seed + JUDGED_OFFSET).e2e_us())
    predicted = np.nanmean(_run(unseen.experiment, values, seed + JUDGED_OFFSET).e2e_us())
    return {
        "step_mape_percent": mape_percent(PhysicalModel().predict_us(values, unseen.features), unseen.true_us),
        "e2e_error_percent": float(PERCENT * (predicted / truth - 1.0)),
    }


def _faulty(server: KnownSteps, fault: str, rng: Generator) -> tuple[FloatArray, PhysicalFeatures]:
    """Labels and features of one server as a fit with a fault sees them."""
    together = fault == "as_the_study"
    n = len(server.true_us)
    table, label = server.table, server.true_us
    if fault == "wrong_label" or together:
        label = HOST_LABEL_US * (table["num_decode_reqs"] + table["num_prefill_reqs"]).to_numpy(dtype=float)
    if fault == "sampling" or together:
        rows = np.sort(rng.choice(n, size=max(2, int(n * SAMPLED_SHARE)), replace=False))
        if not together:  # the published label is that of the step itself; the interval spans the gap
            total = np.concatenate([[0.0], np.cumsum(label)])
            gaps = np.diff(rows)
            label = np.append(np.diff(total[rows]) / gaps, label[rows[-1]])
        else:
            label = label[rows]
    else:
        rows = np.sort(rng.choice(n, size=min(STEPS_PER_SERVER, n), replace=False))
        label = label[rows]
    sd = HEAVY_NOISE if fault == "noise" else LABEL_NOISE
    noisy = label * np.exp(rng.normal(0.0, sd, label.size) - sd**2 / 2)  # the mean stays
    features = _SEEN.get(fault, lambda known: known.features)(server).rows(rows)
    if fault == "no_decode_attention" or together:
        nothing = np.zeros(len(features))
        features = replace(features, kv_us=nothing, kv_pieces=nothing)
    return noisy, features


def _sums_only(server: KnownSteps) -> PhysicalFeatures:
    """Contexts of the decoding requests summed; prompts as if computed from their first token, all in one request."""
    prefill = server.table["prefill_tokens"].to_numpy(dtype=float)
    table = server.table.assign(prefill_pairs=prefill * (prefill + 1) / 2, prefill_kv_tokens=prefill)
    return table_features(table, server.experiment)


def _hidden(server: KnownSteps) -> PhysicalFeatures:
    """Contexts guessed from the workload: prompt plus half the output for all."""
    workload = server.experiment.workload
    prompt = workload.system_prompt_len + workload.question_len
    guess = server.table["decode_tokens"] * (prompt + workload.output_len / 2)
    prefill = server.table["prefill_tokens"].to_numpy(dtype=float)
    table = server.table.assign(
        decode_kv_tokens=guess, prefill_pairs=prefill * (prefill + 1) / 2, prefill_kv_tokens=prefill
    )
    return table_features(table, server.experiment)


_SEEN: dict[str, Callable[[KnownSteps], PhysicalFeatures]] = {"kv_sums_only": _sums_only, "kv_hidden": _hidden}


def table_features(table: pd.DataFrame, experiment: Experiment) -> PhysicalFeatures:
    """Features of simulated steps (`KnownSteps.table`), in their order."""
    columns = {
        "decode_requests": "decode_tokens",
        "kv_tokens": "decode_kv_tokens",
        "prefill_tokens": "prefill_tokens",
        "prefill_requests": "num_prefill_reqs",
        "prefill_kv_tokens": "prefill_kv_tokens",
        "prefill_pairs": "prefill_pairs",
    }
    counts = {name: table[column].to_numpy(dtype=float) for name, column in columns.items()}
    return physical_features(
        experiment.deployment,
        **counts,
    )


def _run(experiment: Experiment, values: Mapping[str, float], seed: int, *, record: bool = False) -> SimulationResult:
    return simulate(
        experiment.arrivals("poisson", seed=seed),
        experiment.server,
        compile_physical(values, experiment.deployment),
        timeout_s=experiment.workload.timeout_s,
        api_before_us=API_BEFORE_US,
        record_steps=1.0 if record else None,
    )


def _shortened(experiment: Experiment) -> Experiment:
    stages = tuple(replace(s, duration_s=s.duration_s / SHORTENED) for s in experiment.workload.stages)
    return replace(experiment.with_server(offload_blocks=0), workload=replace(experiment.workload, stages=stages))


def _parameters(fits: pd.DataFrame) -> pd.DataFrame:
    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    miss = np.abs(fits["estimate"] - fits["truth"])
    table = fits.assign(
        error_percent=PERCENT * miss / fits["truth"], coverage_percent=PERCENT * (miss <= z * fits["se"])
    )
    grouped = table.groupby(["fault", "name", "unit"], sort=False)
    columns = ["truth", "estimate", "error_percent", "coverage_percent"]
    return grouped[columns].mean().assign(n_seeds=grouped.size()).reset_index()


def _faults(parameters: pd.DataFrame, judged: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for fault, own in parameters.groupby("fault", sort=False):
        runs = judged[judged["fault"] == fault] if len(judged) else judged
        row = {
            "fault": fault,
            "given": FAULTS[str(fault)],
            "parameter_error_percent": float(own["error_percent"].median()),
            "coverage_percent": float(own["coverage_percent"].mean()),
        }
        if len(runs):
            size = runs["e2e_error_percent"].abs()
            row |= {
                "step_mape_percent": float(runs["step_mape_percent"].mean()),
                "e2e_error_percent": float(size.mean()),
                "worst_e2e_percent": float(size.max()),
                "n_below_10": int((size < LIMIT_PERCENT).sum()),
                "n_judged": len(runs),
                "holds": bool((size < LIMIT_PERCENT).all()),
            }
        rows.append(row)
    return pd.DataFrame(rows)


def sums_against_requests(experiments: Sequence[Experiment], *, seed: int = 0) -> pd.DataFrame:
    """Return what is lost where only sums over a batch are known, on simulated steps.

    Prefill pairs are replaced by ``P^2 / 2`` of the step's P prefill tokens: too few where they attend to a cached prefix,
    too many where several prompts share a step. KV tokens summed lose nothing but the rounding of each request's last block.

    Parameters
    ----------
    experiments : sequence of Experiment
        Servers to simulate, at the numbers of the controlled experiment, for an eighth of their time.
    seed : int
        Of the arrivals.

    Returns
    -------
    DataFrame
        `experiment_id`, `prompts` (as run, or all new), `n_steps`, `n_mixed` (with prefill), `pairs_ratio` (``P^2 / 2`` over
        the true number, summed over steps), `mixed_percent`, `worst_percent` (mean and largest absolute change of the
        time of a mixed step), `total_percent` (signed, of all steps' time), `rounding_percent` (mean share of a step's time
        that half a block a request is).
    """
    values, rows = TRUTH, []
    for experiment in experiments:
        load = experiment.workload
        for prompts, groups, each in (
            (CACHED_PROMPTS, load.n_groups, load.n_prompts_per_group),
            (NEW_PROMPTS, NEW_PROMPT_COUNT, 1),
        ):
            stages = tuple(replace(s, duration_s=s.duration_s / STAGE_SHARE) for s in load.stages)
            workload = replace(load, stages=stages, n_groups=groups, n_prompts_per_group=each)
            known = known_steps(replace(experiment.with_server(offload_blocks=0), workload=workload), seed)
            prefill = known.table["prefill_tokens"].to_numpy(dtype=float)
            pairs = prefill * (prefill + 1.0) / 2.0
            without = table_features(known.table.assign(prefill_pairs=pairs), known.experiment)
            guessed = PhysicalModel().predict_us(values, without)
            change = PERCENT * (guessed / known.true_us - 1.0)
            mixed = prefill > 0
            half_blocks = known.features.requests * experiment.architecture.num_layers / 2.0
            rounding = half_blocks * values["kv_block_ns"] / NS_PER_US / known.true_us
            rows.append(
                {
                    "experiment_id": experiment.experiment_id,
                    "prompts": prompts,
                    "n_steps": int(mixed.size),
                    "n_mixed": int(mixed.sum()),
                    "pairs_ratio": float(pairs.sum() / known.table["prefill_pairs"].sum()),
                    "mixed_percent": float(np.abs(change[mixed]).mean()),
                    "worst_percent": float(np.abs(change[mixed]).max()),
                    "total_percent": float(PERCENT * (guessed.sum() / known.true_us.sum() - 1.0)),
                    "rounding_percent": float(PERCENT * rounding.mean()),
                }
            )
    return pd.DataFrame(rows)
