"""Which further run would teach most: candidates ranked by what they would add to the information of the 16 experiments.

A run's mean step at a batch ``B`` and context ``C`` adds ``j j.T / sigma^2`` to the information matrix, `j` the gradient of
the log step time by the logs of the numbers; the gain is half the growth of its log determinant (D-optimality).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from stepcal.calibration.closed_loop import SIGMA_INTERVAL, Calibration, log_gradient
from stepcal.calibration.gauss_newton import significant
from stepcal.specs.architecture import load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.step_time.physical import physical_features
from stepcal.step_time.physical_parameters import PARAMETERS

MODELS = ("llama-2-7b", "codellama-34b", "llama-2-70b", "mixtral-8x7b")
DEGREES = (1, 2, 4, 8)
BATCHES, CONTEXTS, PREFILLS = (1, 16, 64, 128), (500, 4_000, 16_000), (0, 512)
HBM_SHARE_FOR_WEIGHTS = 0.9
"""Servers whose weights alone fill more of the memory are no candidates."""


def rank_next_experiments(fitted: Calibration, *, accelerator: str = "h100-sxm", most: int = 10) -> pd.DataFrame:
    """Rank further runs.

    Parameters
    ----------
    fitted : Calibration
    accelerator : str
    most : int
        Rows to return.

    Returns
    -------
    DataFrame
        `model`, `tensor_parallel`, `batch`, `context_tokens`, `prefill_tokens` (a step), `gain_nats`, `tells_most_about`.
    """
    gpu = load_accelerator(accelerator)
    information = fitted.jacobian.T @ fitted.jacobian
    covariance = np.linalg.inv(information)
    rows = []
    for name in MODELS:
        architecture = load_architecture(name)
        size = architecture.weights_bytes()
        for degree in DEGREES:
            if size / degree > HBM_SHARE_FOR_WEIGHTS * gpu.hbm_capacity_bytes:
                continue
            grid = [(b, c, p) for b in BATCHES for c in CONTEXTS for p in PREFILLS]
            batch, context, prefill = (np.array(column, dtype=float) for column in zip(*grid, strict=True))
            features = physical_features(
                Deployment(architecture, gpu, degree),
                decode_requests=batch,
                kv_tokens=batch * context,
                prefill_tokens=prefill,
                prefill_requests=np.minimum(prefill, 1.0),
            )
            gradient = log_gradient(fitted.values, features) / SIGMA_INTERVAL
            spread = np.einsum("ij,jk,ik->i", gradient, covariance, gradient)
            for (b, c, p), j, s in zip(grid, gradient, spread, strict=True):
                shrink = (covariance @ j) ** 2 / (1.0 + s) / np.diag(covariance)
                most_about = PARAMETERS[int(np.argmax(significant(shrink)))].name
                rows.append((name, degree, b, c, p, 0.5 * np.log1p(s), most_about))
    columns = ["model", "tensor_parallel", "batch", "context_tokens", "prefill_tokens", "gain_nats", "tells_most_about"]
    table = pd.DataFrame(rows, columns=columns)
    # Rows that are equal but for the last bits stay in the order of the grid, on every machine.
    table = table.iloc[np.argsort(-significant(table["gain_nats"].to_numpy()), kind="stable")]
    best = table.drop_duplicates(["model", "tensor_parallel", "tells_most_about"])
    return best.head(most).reset_index(drop=True)
