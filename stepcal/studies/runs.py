"""What each study does with its tables; its analysis is imported when it runs, for a stored result needs none of them."""

from __future__ import annotations

from typing import Any

import pandas as pd

from stepcal.studies.study import Tables

TablesAndTexts = tuple[Tables, dict[str, str]]


def h1(steps: pd.DataFrame, **options: Any) -> TablesAndTexts:
    """Correlations of components with the label."""
    from stepcal.studies.h1 import run_h1

    return run_h1(steps, **options)


def h2(steps: pd.DataFrame, **options: Any) -> TablesAndTexts:
    """Every variant on the test split."""
    from stepcal.studies.h2 import run_h2

    return run_h2(steps, **options)


def rescored(predictions: pd.DataFrame) -> TablesAndTexts:
    """The published predictions, scored again."""
    from stepcal.studies.h1 import run_rescored

    return run_rescored(predictions)


def end_to_end(steps: pd.DataFrame, requests: pd.DataFrame, **options: Any) -> TablesAndTexts:
    """Every variant in the simulator."""
    from stepcal.studies.end_to_end import run_end_to_end

    return run_end_to_end(steps, requests, **options)


def label_audit(steps: pd.DataFrame, requests: pd.DataFrame, predictions: pd.DataFrame) -> TablesAndTexts:
    """What the label measures."""
    from stepcal.datasets import experiments, load_stages
    from stepcal.studies.diagnosis.label_audit import run_label_audit

    return run_label_audit(steps, requests, predictions, experiments(), load_stages())


def reconstruction(steps: pd.DataFrame, requests: pd.DataFrame) -> TablesAndTexts:
    """Batches rebuilt from requests."""
    from stepcal.datasets import experiments
    from stepcal.studies.diagnosis.batch_reconstruction import run_reconstruction

    return run_reconstruction(steps, requests, experiments())


def offloading(
    steps: pd.DataFrame, requests: pd.DataFrame, predictions: pd.DataFrame, **options: Any
) -> TablesAndTexts:
    """KV offloading as the cause of the label's milliseconds."""
    from stepcal.datasets import experiments
    from stepcal.studies.diagnosis.kv_offloading import run_offloading

    return run_offloading(steps, requests, predictions, experiments(), **options)


def attribution(steps: pd.DataFrame, requests: pd.DataFrame, **options: Any) -> TablesAndTexts:
    """What the label is worth, and what physics is."""
    from stepcal.studies.diagnosis.attribution import run_attribution

    return run_attribution(steps, requests, **options)


def physical_model(steps: pd.DataFrame, requests: pd.DataFrame) -> TablesAndTexts:
    """The physical model, fitted and cross-validated."""
    from stepcal.datasets import experiments
    from stepcal.studies.physical_model import run_physical_model

    return run_physical_model(steps, requests, experiments())


def physical_evidence(steps: pd.DataFrame, requests: pd.DataFrame) -> TablesAndTexts:
    """Evidence for the hypotheses about it."""
    from stepcal.datasets import experiments
    from stepcal.studies.evidence_physical import run_physical_evidence

    return run_physical_evidence(steps, requests, experiments())


def ablations(steps: pd.DataFrame, requests: pd.DataFrame, **options: Any) -> TablesAndTexts:
    """Its parameters from less, and other forms of it."""
    from stepcal.studies.ablations import run_ablations

    return run_ablations(steps, requests, **options)


def transfer(runs: pd.DataFrame, measured: pd.DataFrame) -> TablesAndTexts:
    """Runs that came after its freeze."""
    from stepcal.studies.kernels.transfer import run_transfer

    return run_transfer(runs, measured)


def kernel_model(requests: pd.DataFrame, **options: Any) -> TablesAndTexts:
    """Step times from measured kernels, on the runs they were fitted to."""
    from stepcal.studies.kernels.kernel_model import run_kernel_model

    return run_kernel_model(requests, **options)


def kernel_transfer(runs: pd.DataFrame, measured: pd.DataFrame) -> TablesAndTexts:
    """The same on runs that no fit saw."""
    from stepcal.studies.kernels.kernel_transfer import run_kernel_transfer

    return run_kernel_transfer(runs, measured)


def kernel_uncertainty(requests: pd.DataFrame, runs: pd.DataFrame, measured: pd.DataFrame) -> TablesAndTexts:
    """What its predictions are worth."""
    from stepcal.studies.kernels.kernel_uncertainty import run_kernel_uncertainty

    return run_kernel_uncertainty(requests, runs, measured)


def silicon_rows() -> pd.DataFrame:
    """Public benchmark rows at fixed concurrency, those that ship."""
    from stepcal.studies.kernels.silicon import silicon_rows_that_ship

    return silicon_rows_that_ship()


def silicon(rows: pd.DataFrame) -> TablesAndTexts:
    """The frozen models on them, closed loop."""
    from stepcal.studies.kernels.silicon import run_silicon

    return run_silicon(rows)
