"""The 16 runs of the study as experiments, from the tables that we ship."""

from __future__ import annotations

import pandas as pd

from stepcal.datasets import experiments, load_stages
from stepcal.experiments.experiment import CLIENT_TIMEOUT_S, Experiment
from stepcal.simulator import LoadStage, ServerConfig, Workload
from stepcal.specs.architecture import load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.specs.kv_offloading import offload_blocks
from stepcal.specs.sampling import publishers_sampling

STUDY_OFFLOAD_GIB = 8.0
"""Size of the pool in CPU memory that we infer for the 16 servers (`kv_offloading_gib` of data/experiments.csv)."""


def load_experiments(requests: pd.DataFrame | None = None) -> list[Experiment]:
    """Return the 16 experiments from the tables that ship, with their measured requests where given.

    Parameters
    ----------
    requests : DataFrame, optional
        Request rows of all experiments (`stepcal.datasets.load_requests`).
    """
    stages = load_stages()
    of_run = dict(iter(requests.groupby("experiment_id", observed=True))) if requests is not None else {}
    result = []
    for run in experiments().to_dict("records"):
        name = str(run["experiment_id"])
        own = stages[stages["experiment_id"] == name].sort_values("stage")
        workload = Workload(
            n_groups=int(run["run_groups"]),
            n_prompts_per_group=int(run["run_prompts_per_group"]),
            system_prompt_len=int(run["run_system_prompt_tokens"]),
            question_len=int(run["run_question_tokens"]),
            output_len=int(run["run_output_tokens"]),
            stages=tuple(
                LoadStage(float(rate), float(duration))
                for rate, duration in zip(own["requested_rate_per_s"], own["duration_s"], strict=True)
            ),
            timeout_s=CLIENT_TIMEOUT_S,
        )
        architecture = load_architecture(str(run["model"]))
        server = ServerConfig(
            kv_blocks=int(run["kv_blocks_total"]),
            max_num_seqs=int(run["max_num_seqs"]),
            max_num_batched_tokens=int(run["max_num_batched_tokens"]),
            max_model_len=int(run["max_model_len"]),
            block_size=int(run["block_size"]),
            offload_blocks=offload_blocks(
                architecture, float(run["kv_offloading_gib"]), block_size=int(run["block_size"])
            ),
        )
        result.append(
            Experiment(
                experiment_id=name,
                deployment=Deployment(
                    architecture,
                    load_accelerator(str(run["gpu"])),
                    int(run["tensor_parallel"]),
                    server,
                    publishers_sampling(architecture.name),
                ),
                workload=workload,
                overloaded=bool(run["overloaded"]),
                requests=of_run[name].reset_index(drop=True) if name in of_run else None,
            )
        )
    return result
