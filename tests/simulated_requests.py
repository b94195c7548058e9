"""What a simulation measures in place of clients, in the form of the request table."""

import numpy as np
import pandas as pd

TIMEOUT_S = 300.0


def measured_table(result, experiment_id: str) -> pd.DataFrame:
    """Requests of a `SimulationResult`; one that did not complete has the client's timeout for latencies, as in the data."""
    table = result.request_table()
    return pd.DataFrame(
        {
            "experiment_id": experiment_id,
            "index": np.arange(len(table)),
            "arrival_time_us": np.rint(table["arrival_s"] * 1e6).astype(int),
            "prompt_tokens": table["prompt_tokens"],
            "output_tokens": table["output_tokens"],
            "has_error": table["e2e_s"].isna(),
            "e2e_s": table["e2e_s"].fillna(TIMEOUT_S),
            "ttft_s": table["ttft_s"].fillna(TIMEOUT_S),
        }
    )
