"""What the page on benchmarks at fixed concurrency cites."""

from __future__ import annotations

import pandas as pd

from stepcal.studies.kernels import silicon

GROUP = ["model", "gpu", "precision"]
H100_70B = ("llama-3.1-70b", "h100-sxm", "fp8")
H200_70B = ("llama-3.1-70b", "h200-sxm", "fp8")
H100_32B = ("qwen3-32b", "h100-sxm", "16-bit")


def silicon_numbers(rows: pd.DataFrame) -> dict[str, object]:
    """Return what the page cites; errors in percent, mean absolute over rows unless the name says otherwise.

    Parameters
    ----------
    rows : DataFrame
        Table ``rows`` of the study ``silicon``.
    """
    own = silicon.summary(rows).set_index(GROUP)
    beside = silicon.beside_peer(rows).set_index(GROUP)
    return {
        "n_rows": len(rows),
        "n_models": int(rows["model"].nunique()),
        "n_suspect": int((rows["suspect"] != "").sum()),
        "tpot_70b": own.loc[H100_70B, "tpot"],
        "ttft_70b": own.loc[H100_70B, "ttft"],
        "tpot_70b_h200": own.loc[H200_70B, "tpot"],
        "tpot_70b_h200_median": own.loc[H200_70B, "tpot_median"],
        "bias_32b": own.loc[H100_32B, "tpot_bias"],
        "ttft_32b": own.loc[H100_32B, "ttft"],
        "tpot_8b": own.loc[("llama-3.1-8b", "h200-sxm", "fp8"), "tpot"],
        "tpot_minimax": own.loc[("minimax-m2.5", "h200-sxm", "fp8"), "tpot"],
        "tpot_235b": own.loc[("qwen3-235b-a22b-fp8", "h200-sxm", "fp8"), "tpot"],
        "n_both": int(beside["both"].sum()),
        "peer_tpot_70b": beside.loc[H100_70B, "peer_tpot"],
        "peer_ttft_70b": beside.loc[H100_70B, "peer_ttft"],
        "own_tpot_70b": beside.loc[H100_70B, "tpot"],
        "own_ttft_70b": beside.loc[H100_70B, "ttft"],
        "peer_tpot_h200": beside.loc[H200_70B, "peer_tpot"],
        "own_tpot_h200": beside.loc[H200_70B, "tpot"],
    }
