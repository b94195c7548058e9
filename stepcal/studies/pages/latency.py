"""What the pages on latencies cite: end_to_end, verdict, kernel_transfer.

Errors are of mean E2E unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from stepcal.datasets import measured, peers
from stepcal.evaluation.verdict import Verdict
from stepcal.experiments.latencies import WHOLE
from stepcal.studies.kernels.kernel_transfer import FP8, H100_16_BIT, ablation_summary, group_summary
from stepcal.studies.kernels.kernel_uncertainty import coverage
from stepcal.studies.study import Study
from stepcal.units import PERCENT

NO_LABEL = ("pace", "training_mean", "raw")
"""Variants that learned nothing from the study's label."""
WHOLE_RUN = -1
"""Stage of figures of a whole run in the tables of measured and published figures."""


def whole_runs(study: Study) -> pd.DataFrame:
    """Return the errors of whole runs at replayed arrivals, from the study ``end_to_end``."""
    return study["errors"].query("split == 'whole' and arrivals == 'replayed'")


def end_to_end_numbers(study: Study) -> dict[str, object]:
    """Return what the page end to end cites, from the study ``end_to_end``; errors in percent, mean absolute over runs."""
    errors = study["errors"]
    whole = whole_runs(study).assign(size=lambda t: t["e2e_error_percent"].abs())
    means = whole.groupby("variant", sort=False)["size"].mean()
    label_models = [name for name in means.index if name not in NO_LABEL]
    late = errors.query("split == 'test' and arrivals == 'replayed'")
    late_pace = late[late["variant"] == "pace"]["e2e_error_percent"].abs()
    return {
        "pace": float(means["pace"]),
        "training_mean": float(means["training_mean"]),
        "pace_test": float(late_pace.mean()),
        "n_pace_test": len(late_pace),
        "best_label": float(means[label_models].min()),
        "worst_label": float(means[label_models].max()),
        "smallest_label": float(whole[whole["variant"].isin(label_models)]["size"].min()),
        "n_pace": int((whole["variant"] == "pace").sum()),
        "n_label_models": len(label_models),
        "n_no_test": whole["experiment_id"].nunique() - late["experiment_id"].nunique(),
        "arrivals_worst": float(arrivals_compared(study)["difference"].abs().max()),
    }


def errors_by_variant(study: Study, variants: Sequence[str]) -> pd.DataFrame:
    """Return the errors of the means by variant, in the order given: `n`, `e2e`, `bias`, `ttft`, `tpot` (%)."""
    table = (
        whole_runs(study)
        .groupby("variant", sort=False)
        .agg(
            n=("experiment_id", "size"),
            e2e=("e2e_error_percent", lambda s: s.abs().mean()),
            bias=("e2e_error_percent", "mean"),
            ttft=("ttft_error_percent", lambda s: s.abs().mean()),
            tpot=("tpot_error_percent", lambda s: s.abs().mean()),
        )
    )
    return table.reindex([v for v in variants if v in table.index]).reset_index()


def errors_by_experiment(study: Study, *, split: str = WHOLE) -> pd.DataFrame:
    """Return the signed error of each experiment's mean E2E at replayed arrivals, a column a variant."""
    chosen = study["errors"].query("arrivals == 'replayed'")
    chosen = chosen[chosen["split"] == split]
    return chosen.pivot(index="experiment_id", columns="variant", values="e2e_error_percent").reset_index()


def failures_compared(study: Study) -> pd.DataFrame:
    """Return the requests that clients gave up, measured and by variant, in runs that have any."""
    figures = measured().query("metric == 'requests' and statistic == 'failed'")
    given_up = figures[figures["stage"] == WHOLE_RUN].set_index("experiment_id")["value"]
    runs = study["runs"].query("arrivals == 'replayed' and variant in ['pace', 'global9', 'model36']")
    table = runs.pivot(index="experiment_id", columns="variant", values="failed").reset_index()
    table["measured"] = table["experiment_id"].map(given_up)
    return table[(table["measured"] > 0) | (table["pace"] > 0)]


def pace_by_statistic(study: Study) -> pd.DataFrame:
    """Return the constant pace's signed error of E2E statistics, a column a statistic."""
    own = study["latencies"].query("variant == 'pace' and split == 'whole' and metric == 'e2e'")
    return own.pivot(index="experiment_id", columns="statistic", values="error_percent").reset_index()


def errors_by_stage(study: Study) -> pd.DataFrame:
    """Return the signed errors of the means by load stage; columns are named ``variant metric``."""
    stages = study["latencies"].query("split != 'whole' and statistic == 'mean' and variant in ['pace', 'model36']")
    table = stages.pivot(index=["experiment_id", "split"], columns=["variant", "metric"], values="error_percent")
    table.columns = pd.Index([" ".join(map(str, names)) for names in table.columns.to_flat_index()])
    return table.reset_index()


def arrivals_compared(study: Study) -> pd.DataFrame:
    """Return the constant pace's signed error of mean E2E with replayed and with generated arrivals (`poisson`)."""
    own = study["errors"].query("split == 'whole' and variant == 'pace'")
    table = own.pivot(index="experiment_id", columns="arrivals", values="e2e_error_percent").reset_index()
    return table.assign(difference=table["poisson"] - table["replayed"])


def beside_peers(study: Study, ours: dict[str, str]) -> pd.DataFrame:
    """Return the errors of public simulators on whole runs, and of some variants of ours on the same experiments.

    Parameters
    ----------
    study : Study
        ``end_to_end``.
    ours : dict
        Name to show of each variant.

    Returns
    -------
    DataFrame
        `simulator`, `experiments` (how many), `mean` and `worst` absolute error, `bias` (%); smallest mean first.
    """
    others = peers().query("metric == 'e2e' and statistic == 'mean'")
    others = others[others["stage"] == WHOLE_RUN]
    others = others.assign(e2e_error_percent=PERCENT * (others["predicted_ms"] / others["measured_ms"] - 1))
    own = whole_runs(study)
    own = own[own["experiment_id"].isin(others["experiment_id"]) & own["variant"].isin(list(ours))]
    own = own.assign(simulator="ours: " + own["variant"].map(ours))
    both = pd.concat([others, own])[["simulator", "experiment_id", "e2e_error_percent"]]
    both = both.assign(size=both["e2e_error_percent"].abs())
    table = both.groupby("simulator", sort=False).agg(
        experiments=("experiment_id", "size"),
        mean=("size", "mean"),
        bias=("e2e_error_percent", "mean"),
        worst=("size", "max"),
    )
    return table.sort_values("mean").reset_index()


def verdict_numbers(study: Study, ours: Verdict, published: Verdict) -> dict[str, object]:
    """Return what the page of verdicts cites.

    Parameters
    ----------
    study : Study
        ``end_to_end``.
    ours, published : Verdict
        H2's, on our evidence and on the published figures.
    """
    evidence = study["evidence"].dropna(subset=["value"])
    size = evidence["value"].abs()
    return {
        "h2_lower": ours.verdict.lower(),
        "h2_published_lower": published.verdict.lower(),
        "h2_published_possible": " or ".join(v.lower() for v in published.possible),
        "n_evaluable": int(evidence["experiment_id"].nunique()),
        "smallest_error": float(size.min()),
        "largest_error": float(size.max()),
    }


def _model_and_workload(experiment_id: object) -> str:
    """Model and workload of a run of the study, by its name: date, time, model, ranks, workload."""
    model, _, rest = str(experiment_id).split("-", 2)[2].partition("-tp")
    return f"{model} {rest.partition('-')[2]}"


def kernel_transfer_numbers(study: Study, own: Study, worth: Study) -> dict[str, object]:
    """Return what the page on the kernel model's transfer cites; errors in percent, mean absolute over runs.

    Parameters
    ----------
    study, own, worth : Study
        ``kernel_transfer``, ``kernel_model`` and ``kernel_uncertainty``.
    """
    groups = group_summary(study.tables).set_index("group")
    ablated = ablation_summary(study.tables).set_index("variant")
    left, spread = worth["left_out"]["error_percent"].abs(), coverage(worth["intervals"]).iloc[-1]
    whole = own["errors"].query("split == 'whole'")
    calm, full = whole[~whole["overloaded"]], whole[whole["overloaded"]]
    calm_size, full_size = calm["e2e_error_percent"].abs(), full["e2e_error_percent"].abs()
    folds = own["folds"]
    calm_folds = folds[~folds["overloaded"]]
    folds_sorted = calm_folds["e2e_error_percent"].abs().sort_values(ascending=False)
    missed = calm_folds.loc[folds_sorted.index[0]]
    h100 = {str(name): float(groups[name][H100_16_BIT]) for name in groups}
    seeds = study["errors"].query("split == 'whole' and metric == 'e2e' and statistic == 'mean'")["spread_percent"]
    return {
        "n_h100": int(h100["runs"]),
        "h100": h100["e2e"],
        "h100_bias": h100["bias"],
        "h100_worst": h100["worst"],
        "h100_p99": h100["e2e_p99"],
        "h100_ttft_p99": h100["ttft_p99"],
        "fp8": groups.loc[FP8, "e2e"],
        "fp8_worst": groups.loc[FP8, "worst"],
        "a100": groups.loc["a100-80gb", "e2e"],
        "l40s": groups.loc["l40s", "e2e"],
        "calm": calm_size.mean(),
        "calm_worst": calm_size.max(),
        "full": full_size.mean(),
        "full_worst": full_size.max(),
        "full_completed": full["completed_error_percent"].abs().max(),
        "off_sampler": ablated.loc["sampler off", H100_16_BIT],
        "off_kernels": ablated.loc["bytes instead of kernels", "a100-80gb"],
        "bytes_sampler": ablated.loc["bytes and a sampler", H100_16_BIT],
        "off_tables": ablated.loc["medians of GPUs instead of the GPU's tables", "a100-80gb"],
        "no_skew": ablated.loc["even routing", FP8],
        "nothing": ablated.loc["nothing fitted", H100_16_BIT],
        "left_out": left.mean(),
        "left_out_worst": left.max(),
        "n_left_out": len(left),
        "refit": calm_folds["e2e_error_percent"].abs().mean(),
        "refit_ttft": calm_folds["ttft_error_percent"].abs().mean(),
        "refit_worst": abs(float(missed["e2e_error_percent"])),
        "refit_worst_ttft": abs(float(missed["ttft_error_percent"])),
        "refit_worst_run": _model_and_workload(missed["experiment_id"]),
        "refit_others": float(folds_sorted.iloc[1:].mean()),
        "least_completed_run": _model_and_workload(
            full["experiment_id"].iloc[int(full["completed_error_percent"].abs().argmax())]
        ),
        "inside": int(spread["inside"]),
        "n_all": int(spread["runs"]),
        "half_width": spread["half_width_percent"],
        "seeds_median": float(seeds.median()),
        "seeds_worst": float(seeds.max()),
    }
