"""The 31 runs of ``data/transfer/``: other models, GPUs and precisions, simulated with coefficients that never saw them.

Every prediction is closed loop, the mean over the seeds of Poisson arrivals that the pre-registrations name. H3 is judged
here by its frozen rules, with the coefficients that it names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from stepcal.datasets import transfer_measured, transfer_peers, transfer_runs
from stepcal.evaluation.latency_errors import compare
from stepcal.experiments.engine_args import Settings, server_of
from stepcal.experiments.experiment import CLIENT_TIMEOUT_S, Experiment, run_experiment
from stepcal.experiments.folders import Case
from stepcal.experiments.latencies import LATENCIES, WHOLE, predicted_latencies, summary_latencies
from stepcal.locations import data_folder
from stepcal.simulator import LoadStage, Workload
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.specs.sampling import publishers_sampling
from stepcal.specs.weight_formats import FULL_WIDTH, WeightWidths
from stepcal.step_time.coefficients import StepTimeModel, load_coefficients
from stepcal.step_time.compile import AnyStepTime
from stepcal.studies.evidence_physical import BOARDS, H3_COEFFICIENTS, SEEDS
from stepcal.studies.published_runs import STUDY_OFFLOAD_GIB
from stepcal.studies.study import Tables
from stepcal.units import PERCENT

MAX_MODEL_LEN = 4096
"""Context limit of the servers of this harness; the 31 runs do not publish theirs."""
N_GROUPS, N_PROMPTS_PER_GROUP = 10, 10
"""The load generator's cycle of prompts in all runs of this harness (data/README.md)."""
KEYS = ("experiment_id", "split", "metric", "statistic")
LARGE_VOCABULARY = 100_000
"""Tokens: the 31 models have about 32,000, or 128,000 and more."""
NOT_PUBLISHED = "how many requests completed is not published; all are taken to have"


def transfer_cases(experiment_ids: tuple[str, ...] = ()) -> list[Case]:
    """Return the 31 runs as experiments with what their clients measured; all of them, or those that are named.

    Returns
    -------
    list of (Experiment, DataFrame)
        The second as `stepcal.experiments.latencies.summary_latencies` gives it; latencies in ms.
    """
    measured = dict(iter(transfer_measured().groupby("experiment_id")))
    return [
        _case(row, measured[str(row["experiment_id"])])
        for row in transfer_runs().to_dict("records")
        if not experiment_ids or row["experiment_id"] in experiment_ids
    ]


def transfer_architecture(model: str) -> ModelArchitecture:
    """Return the architecture of a model of ``data/transfer/architectures/``."""
    path = data_folder() / "transfer" / "architectures" / f"{model}.json"
    return ModelArchitecture.from_config(path, name=model, max_model_len=MAX_MODEL_LEN)


def _case(row: Mapping[Hashable, Any], measured: pd.DataFrame) -> Case:
    architecture, gpu = transfer_architecture(str(row["model"])), load_accelerator(str(row["gpu"]))
    degree = int(row["tensor_parallel"])
    values: dict[str, object] = {
        "max_model_len": MAX_MODEL_LEN,
        **{k: row[k] for k in ("max_num_batched_tokens", "max_num_seqs", "gpu_memory_utilization")},
        "kv_offloading_size": STUDY_OFFLOAD_GIB if row["kv_cpu_offload"] else 0.0,
        # Blocks that were logged for Llama-4-Scout are as large as all its layers: 8,253 of 1.5 MiB fill what weights leave
        # of the memory, while those of 12 layers would fill a quarter of it. So its layers were not kept in groups.
        "disable_hybrid_kv_cache_manager": True,
    }
    if not math.isnan(row["kv_blocks"]):
        values["kv_blocks"] = int(row["kv_blocks"])
    settings = Settings(Path("data/transfer/runs.csv"), values)
    server, notes = server_of(settings, architecture, gpu, tensor_parallel=degree)
    stages = [stage.split("x") for stage in str(row["stages"]).split(";")]
    workload = Workload(
        n_groups=N_GROUPS,
        n_prompts_per_group=N_PROMPTS_PER_GROUP,
        system_prompt_len=int(row["system_prompt_tokens"]),
        question_len=int(row["question_tokens"]),
        output_len=int(row["output_tokens"]),
        stages=tuple(LoadStage(float(rate), float(duration)) for rate, duration in stages),
        timeout_s=CLIENT_TIMEOUT_S,
    )
    experiment = Experiment(
        experiment_id=str(row["experiment_id"]),
        deployment=Deployment(architecture, gpu, degree, server, publishers_sampling(architecture.name)),
        workload=workload,
        overloaded=False,
        notes=(*notes, NOT_PUBLISHED),
    )
    return experiment, summary_latencies(measured, workload.output_len)


def transfer_errors(coefficients: StepTimeModel, cases: list[Case], *, seeds: range = SEEDS) -> pd.DataFrame:
    """Simulate runs with given coefficients, and compare the mean over the seeds with what was measured; see `errors_of`."""
    return errors_of(coefficients.compile, cases, coefficients.api_overheads_us(), seeds=seeds)


def errors_of(
    compile_step_time: Callable[[Deployment], AnyStepTime],
    cases: list[Case],
    overheads_us: Mapping[str, float],
    *,
    seeds: range = SEEDS,
) -> pd.DataFrame:
    """Simulate runs with any step time, and compare the mean over the seeds with what was measured.

    Parameters
    ----------
    compile_step_time : callable
        Step time of a deployment.
    cases : list of (Experiment, DataFrame)
    overheads_us : mapping
        API overheads, as `stepcal.simulator.simulate` takes them.
    seeds : range
        Of the Poisson arrivals.

    Returns
    -------
    DataFrame
        `experiment_id`, `split`, `metric`, `statistic`, `predicted` and `measured` (ms), `error_percent` (signed), and
        `spread_percent`, the standard deviation of the error over the seeds.
    """
    parts = []
    for experiment, known in cases:
        step_time = compile_step_time(experiment.deployment)
        tables = []
        for seed in seeds:
            result = run_experiment(experiment, step_time, process="poisson", seed=seed, **overheads_us)
            tables.append(compare(predicted_latencies(result, experiment.workload.output_len), known))
        by_key = pd.concat(tables).groupby(list(KEYS[1:]), sort=False)
        mean = by_key[["predicted", "measured", "error_percent"]].mean()
        mean["spread_percent"] = by_key["error_percent"].std(ddof=0)
        parts.append(mean.reset_index().assign(experiment_id=experiment.experiment_id))
    table = pd.concat(parts, ignore_index=True)
    return table[table["metric"].isin(LATENCIES)][[*KEYS, "predicted", "measured", "error_percent", "spread_percent"]]


def run_transfer(runs: pd.DataFrame, measured: pd.DataFrame) -> tuple[Tables, dict[str, str]]:
    """Judge H3 on the 31 runs: its frozen coefficients, its frozen rules.

    Parameters
    ----------
    runs, measured : DataFrame
        ``transfer/runs.csv`` and ``transfer/measured.csv``.

    Returns
    -------
    tables : dict
        ``errors`` (of `transfer_errors`, configs as read when H3 was frozen), ``widths_by_group`` (the same of the runs
        whose weights are read otherwise today), ``runs`` (what each run has in common with others: model, GPU, precision,
        vocabulary, whether its sampling defaults sort the logits), ``evidence`` (what H3's criteria look at).
    texts : dict
        Empty.
    """
    del measured  # `transfer_cases` takes the shipped one; it is named because the recording depends on it
    cases, frozen = transfer_cases(tuple(runs["experiment_id"])), load_coefficients(H3_COEFFICIENTS)
    errors = transfer_errors(frozen, [(as_read_when_frozen(experiment), known) for experiment, known in cases])
    by_group = transfer_errors(frozen, [case for case in cases if as_read_when_frozen(case[0]) != case[0]])
    about = pd.DataFrame([_about(experiment) for experiment, _ in cases])
    table = runs[
        ["experiment_id", "model", "gpu", "precision", "tensor_parallel", "max_num_batched_tokens", "workload"]
    ]
    tables = {
        "errors": errors,
        "widths_by_group": by_group,
        "runs": table.merge(about, on="experiment_id"),
        "evidence": h3_rows(errors, cases),
    }
    return tables, {}


def as_read_when_frozen(experiment: Experiment) -> Experiment:
    """Return a run with all its weights at the declared width, as configs were read when H3 was frozen.

    Since then the widths of a quantised checkpoint are read by group of weights; a judgement must not profit from that.
    """
    width = experiment.architecture.bytes_per_weight
    if width == FULL_WIDTH:
        return experiment
    widths = WeightWidths(*(width for _ in fields(WeightWidths)))
    architecture = replace(experiment.architecture, weight_widths=widths)
    return replace(experiment, deployment=replace(experiment.deployment, architecture=architecture))


def _about(experiment: Experiment) -> dict[str, object]:
    return {
        "experiment_id": experiment.experiment_id,
        "vocab_size": experiment.architecture.vocab_size,
        "sorts_logits": experiment.deployment.sampling.restricts_tokens,
        "is_mixture": experiment.architecture.is_mixture,
        "kv_blocks": experiment.server.kv_blocks,
        "notes": "; ".join(note.rstrip(".") for note in experiment.notes),
    }


def errors_by_run(study: Tables) -> pd.DataFrame:
    """Return the errors of each whole run beside what it has in common with others, for a page.

    Returns
    -------
    DataFrame
        The study's ``runs`` with `group`, signed errors (%) of the means `e2e`, `ttft`, `tpot`, and of `e2e_p90`, `e2e_p99`,
        `ttft_p90`, `ttft_p99`; mean E2E as `e2e_measured_ms` and `e2e_predicted_ms`.
    """
    whole = study["errors"]
    whole = whole[whole["split"] == WHOLE]
    name = whole["metric"].where(whole["statistic"] == "mean", whole["metric"] + "_" + whole["statistic"])
    wide = whole.assign(name=name).pivot(index="experiment_id", columns="name", values="error_percent")
    means = whole[name == "e2e"].set_index("experiment_id")
    wide = wide.assign(e2e_measured_ms=means["measured"], e2e_predicted_ms=means["predicted"])
    table = study["runs"].merge(wide.reset_index(), on="experiment_id", validate="one_to_one")
    return table.assign(group=[_group(row) for row in table.to_dict("records")])


def mean_e2e_percent(errors: pd.DataFrame) -> float:
    """Return the mean signed error of mean E2E over whole runs, of a table like that of `transfer_errors`."""
    chosen = (errors["split"] == WHOLE) & (errors["metric"] == "e2e") & (errors["statistic"] == "mean")
    return float(errors.loc[chosen, "error_percent"].mean())


def _group(row: Mapping[Hashable, Any]) -> str:
    if row["precision"] == "fp8":
        return "FP8 on H100"
    if row["gpu"] != "h100-sxm":
        return str(row["gpu"])
    if row["vocab_size"] < LARGE_VOCABULARY:
        return "H100, vocabulary of 32,000"
    return "H100, large vocabulary, top-p" if row["sorts_logits"] else "H100, large vocabulary, no top-p"


def peer_comparison(study: Tables) -> pd.DataFrame:
    """Return each peer's mean absolute E2E error over the runs that it predicted, and ours over the same ones.

    Returns
    -------
    DataFrame
        `simulator`, `runs`, `e2e_percent`, `bias_percent`, `ours_percent`; best first.
    """
    ours = errors_by_run(study).set_index("experiment_id")["e2e"]
    known = transfer_measured().query("stage == -1 and metric == 'e2e' and statistic == 'mean'")
    measured = known.set_index("experiment_id")["value"]
    table = transfer_peers()
    table["error"] = PERCENT * (table["e2e_mean_ms"] / table["experiment_id"].map(measured) - 1.0)
    table["ours"] = table["experiment_id"].map(ours).abs()
    rows = table.groupby("simulator").agg(
        runs=("error", "size"),
        e2e_percent=("error", lambda e: e.abs().mean()),
        bias_percent=("error", "mean"),
        ours_percent=("ours", "mean"),
    )
    return rows.reset_index().sort_values("e2e_percent", ignore_index=True)


def h3_rows(errors: pd.DataFrame, cases: list[Case]) -> pd.DataFrame:
    """Return what H3's criteria look at: the mean E2E of each whole run.

    Parameters
    ----------
    errors : DataFrame
        Of `transfer_errors`.
    cases : list of (Experiment, DataFrame)

    Returns
    -------
    DataFrame
        `quantity`, `variant`, `unit`, `value`, `reason`.
    """
    mean = errors[(errors["split"] == WHOLE) & (errors["metric"] == "e2e") & (errors["statistic"] == "mean")]
    signed = mean.set_index("experiment_id")["error_percent"]
    rows = []
    for experiment, _ in cases:
        value = float(signed[experiment.experiment_id])
        variant = BOARDS[experiment.deployment.accelerator.name]
        rows.append(("e2e_error_percent", variant, experiment.experiment_id, abs(value), ""))
        rows.append(("mspe_percent", variant, experiment.experiment_id, value, ""))
    return pd.DataFrame(rows, columns=["quantity", "variant", "unit", "value", "reason"])
