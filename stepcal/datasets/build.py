"""``make data``: the tables of ``data/``, written anew from the public layout that the measurements came in.

Nothing is computed here beyond renaming, joining, two ratios and a summary of kernel benchmarks: each table says the same as
its source, in one tidy shape, with units in the names. The same input gives the same bytes, and no file changes unless all
could be written.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from stepcal.datasets.facts import OVERLOADED_BELOW_SHARE, TABLES
from stepcal.datasets.kernels import DECODE_FILES, GEMM_FILE, PREFILL_FILES, summarise_kernels
from stepcal.datasets.lifecycle import read_lifecycle_summary, read_load_summary
from stepcal.datasets.readers import read_requests_parquet
from stepcal.datasets.tables import checked_table, content_sha256
from stepcal.errors import InputError
from stepcal.specs.architecture import ModelArchitecture

GPU = "h100-sxm"
LICENSE = "Apache-2.0"
_EXPERIMENT_NAME = re.compile(r"^\d{8}-\d{6}-(?P<model>.+)-tp(?P<tensor_parallel>\d+)-(?P<workload>[a-z]+)$")
INFERRED_OFFLOAD_GIB = 8.0
"""Size of the pool in CPU memory of the 16 servers, which their published settings do not name. We infer it from the label:
``schedule()`` jumps from microseconds to milliseconds where the KV blocks in use pass 8 GiB, for two sizes of block."""
_STUDY = "inference-sim/inference-sim, branch stepml-experiments"
_RUNS = "inference-sim public repositories (inference-sim, training, sim-to-real-accuracy-validation)"

_TRANSFER = "inference-sim/sim-to-real-accuracy-validation"


@dataclass(frozen=True)
class _Model:
    name: str
    huggingface_id: str
    other_names: tuple[str, ...] = ()

    @property
    def config_path(self) -> str:
        return f"models/{self.huggingface_id.rpartition('/')[2]}.json"


_MODELS = (
    _Model("codellama-34b", "codellama/CodeLlama-34b-Instruct-hf", ("codellama-34b-instruct-hf",)),
    _Model("llama-2-70b", "meta-llama/Llama-2-70b-hf", ("llama-2-70b-hf",)),
    _Model("llama-2-7b", "meta-llama/Llama-2-7b-hf", ("llama-2-7b-hf",)),
    _Model("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", ("mixtral-8x7b-v0-1",)),
)
_CANONICAL_NAMES = {named: model.name for model in _MODELS for named in (model.name, *model.other_names)}
_COMPONENT_NAMES = {
    "prefill_gemm_us": "prefill_gemm",
    "prefill_attn_us": "prefill_attn",
    "decode_gemm_us": "decode_gemm",
    "decode_attn_us": "decode_attn",
    "total_analytical_us": "total",
    "batch.prefill_tokens (baseline)": "prefill_tokens",
    "batch.decode_tokens (baseline)": "decode_tokens",
}


def build_tables(public_layout: Path, out: Path) -> list[Path]:
    """Write every table of ``data/`` from the public layout.

    Parameters
    ----------
    public_layout : Path
        Folder with ``experiments/``, ``published/``, ``models/`` and so on (see ``data/README.md``).
    out : Path
        Where the tables go; other files there are left alone.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    InputError
        If a file of the layout is missing or malformed, or a table breaks its schema. Nothing is written then.
    """
    public_layout, out = Path(public_layout), Path(out)
    if not (public_layout / "experiments").is_dir():
        raise InputError(f"{public_layout} holds no `experiments/`: give the folder of the public layout.")
    tables = {name: make(public_layout) for name, (make, _, _, _) in _RECIPES.items()}
    tables["sources.csv"] = _sources(public_layout, tables)
    checked = {name: checked_table(frame, TABLES[name], source=name) for name, frame in tables.items()}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".build-") as folder:
        for name, frame in checked.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            frame.to_csv(target, index=False, lineterminator="\n")
        for name in checked:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(folder) / name, out / name)
    return [out / name for name in checked]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line ``python -m stepcal.datasets.build --public DIR --out DIR``."""
    parser = argparse.ArgumentParser(prog="python -m stepcal.datasets.build", description=__doc__.split("\n")[0])
    parser.add_argument("--public", type=Path, required=True, help="folder of the public layout")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the tables to (data)")
    given = parser.parse_args(arguments)
    try:
        written = build_tables(given.public, given.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(written)} tables written to {given.out}", file=sys.stderr)
    return 0


def _architectures(layout: Path) -> pd.DataFrame:
    return pd.DataFrame([_architecture_row(layout, model) for model in _MODELS])


def _architecture_row(layout: Path, model: _Model) -> dict[str, Any]:
    read = ModelArchitecture.from_config(layout / model.config_path, name=model.name)
    return {
        "name": model.name,
        "aliases": ";".join((*model.other_names, model.huggingface_id)),
        "huggingface_id": model.huggingface_id,
        "hidden_size": read.hidden_size,
        "num_layers": read.num_layers,
        "num_attention_heads": read.num_attention_heads,
        "num_kv_heads": read.num_kv_heads,
        "head_dim": read.head_dim,
        "intermediate_size": read.intermediate_size,
        "num_experts": read.num_experts,
        "experts_per_token": read.experts_per_token,
        "vocab_size": read.vocab_size,
        "tie_word_embeddings": read.tie_word_embeddings,
        "dtype": read.weight_dtype,
        "max_position_embeddings": read.max_position_embeddings,
        "source": model.config_path,
    }


def _experiments(layout: Path) -> pd.DataFrame:
    settings = _csv(layout / "requests" / "server_settings.csv").set_index("experiment_id")
    shares = _served_share(_measured(layout), _load_stages(layout))
    rows = [_experiment_row(folder, settings, shares) for folder in _run_folders(layout)]
    return pd.DataFrame(rows)


def _experiment_row(folder: Path, settings: pd.DataFrame, shares: pd.Series) -> dict[str, Any]:
    name = _EXPERIMENT_NAME.match(folder.name)
    if name is None or name["model"] not in _CANONICAL_NAMES:
        raise InputError(
            f"{folder}: the name is not DATE-TIME-MODEL-tpN-WORKLOAD with one of the models "
            f"{', '.join(_CANONICAL_NAMES)}. Rename the folder."
        )
    server = _yaml(folder / "exp-config.yaml")
    known = settings.loc[folder.name].to_dict()
    agreed = {"tensor_parallelism": int(name["tensor_parallel"])}
    agreed |= {key: int(known[key]) for key in ("max_num_seqs", "max_num_batched_tokens")}
    for key, value in agreed.items():
        if server[key] != value:
            raise InputError(f"{folder}/exp-config.yaml: `{key}` is {server[key]}, elsewhere {value}. Which one ran?")
    asked = _yaml(folder / "profile.yaml")["data"]["shared_prefix"]
    run = _yaml(folder / "results" / "config.yaml")["data"]["shared_prefix"]
    share = float(shares[folder.name])
    return {
        "experiment_id": folder.name,
        "model": _CANONICAL_NAMES[name["model"]],
        "workload": name["workload"],
        "model_as_named": name["model"],
        "tensor_parallel": server["tensor_parallelism"],
        "gpu": GPU,
        "max_model_len": server["max_model_len"],
        "max_num_seqs": server["max_num_seqs"],
        "max_num_batched_tokens": server["max_num_batched_tokens"],
        "kv_blocks_total": int(known["kv_blocks_total_gpu"]),
        "block_size": int(known["block_size"]),
        "kv_offloading_gib": INFERRED_OFFLOAD_GIB,
        **_workload(asked, "asked", groups="num_unique_system_prompts", prompts="num_users_per_system_prompt"),
        **_workload(run, "run", groups="num_groups", prompts="num_prompts_per_group"),
        "served_share": share,
        "overloaded": share < OVERLOADED_BELOW_SHARE,
        "source": f"experiments/{folder.name}",
    }


def _workload(shared_prefix: dict[str, Any], tense: str, *, groups: str, prompts: str) -> dict[str, Any]:
    return {
        f"{tense}_system_prompt_tokens": shared_prefix["system_prompt_len"],
        f"{tense}_question_tokens": shared_prefix["question_len"],
        f"{tense}_output_tokens": shared_prefix["output_len"],
        f"{tense}_groups": shared_prefix[groups],
        f"{tense}_prompts_per_group": shared_prefix[prompts],
        f"{tense}_multi_turn": bool(shared_prefix.get("enable_multi_turn_chat", False)),
    }


def _served_share(measured: pd.DataFrame, stages: pd.DataFrame) -> pd.Series:
    """Completed requests per second over requested, in each run's worst stage."""
    completed = measured.query("metric == 'throughput' and statistic == 'requests'")
    both = stages.merge(completed, on=["experiment_id", "stage"], validate="one_to_one")
    return (both["value"] / both["requested_rate_per_s"]).groupby(both["experiment_id"]).min()


def _load_stages(layout: Path) -> pd.DataFrame:
    rows = []
    for folder in _run_folders(layout):
        for stage, asked in enumerate(_yaml(folder / "results" / "config.yaml")["load"]["stages"]):
            driven = read_load_summary(folder / "results" / f"stage_{stage}_lifecycle_metrics.json")
            rows.append({"experiment_id": folder.name, "stage": stage, "duration_s": asked["duration"], **driven})
    return pd.DataFrame(rows)


def _measured(layout: Path) -> pd.DataFrame:
    tables = [
        read_lifecycle_summary(path).assign(experiment_id=folder.name)
        for folder in _run_folders(layout)
        for path in sorted(folder.glob("results/*_lifecycle_metrics.json"))
    ]
    return pd.concat(tables).sort_values(["experiment_id", "stage"], kind="stable")


def _h1_pooled(layout: Path) -> pd.DataFrame:
    table = _csv(layout / "published" / "h1_correlation_results.csv")
    return table.assign(component=table["component"].map(_COMPONENT_NAMES))


def _h1_per_experiment(layout: Path) -> pd.DataFrame:
    table = _with_canonical_model(_csv(layout / "published" / "h1_per_experiment_correlations.csv"))
    return table.assign(component=table["component"].map(_COMPONENT_NAMES))


def _h2(layout: Path) -> pd.DataFrame:
    names = {"bb_mape": "blackbox_mape_percent"}
    for theirs, ours in {"9param_global": "global9", "36param_per_model": "model36"}.items():
        names |= {f"{theirs}_{metric}": f"{ours}_{metric}_percent" for metric in ("mape", "mspe")}
        names[f"{theirs}_r"] = f"{ours}_r"
    return _with_canonical_model(_csv(layout / "published" / "h2_evaluation_results.csv")).rename(columns=names)


def _xgboost(layout: Path) -> pd.DataFrame:
    names = {"valid_mape": "valid_mape_percent", "test_mape": "test_mape_percent"}
    names |= {f"best_{name}": name for name in ("max_depth", "n_estimators", "learning_rate")}
    return _with_canonical_model(_csv(layout / "published" / "xgboost_experiment_summary.csv")).rename(columns=names)


def _blis(layout: Path) -> pd.DataFrame:
    names = {f"gt_{metric}_ms": f"measured_{metric}_ms" for metric in ("e2e", "ttft")}
    names |= {f"blis_{metric}_ms": f"predicted_{metric}_ms" for metric in ("e2e", "ttft", "itl")}
    return _csv(layout / "published" / "blis_e2e_results.csv").rename(columns=names)


def _peers(layout: Path) -> pd.DataFrame:
    table = _csv(layout / "peers" / "simulator_predictions_ms.csv")
    split = table["metric_name"].str.rsplit("_", n=1, expand=True)
    return (
        table.assign(metric=split[0], statistic=split[1])
        .drop(columns="metric_name")
        .rename(columns={"stage_index": "stage", "predicted": "predicted_ms", "actual": "measured_ms"})
    )


def _transfer_runs(layout: Path) -> pd.DataFrame:
    names = {"run": "experiment_id", "system_prompt_len": "system_prompt_tokens", "question_len": "question_tokens"}
    return _csv(layout / "transfer" / "runs.csv").rename(columns={**names, "output_len": "output_tokens"})


def _transfer_measured(layout: Path) -> pd.DataFrame:
    table = _csv(layout / "transfer" / "measured.csv").rename(columns={"run": "experiment_id", "value_ms": "value"})
    parts = table.pop("metric").str.split("_", expand=True)
    table.insert(2, "metric", parts[0])
    table.insert(3, "statistic", parts[1])
    return table


def _transfer_peers(layout: Path) -> pd.DataFrame:
    return _csv(layout / "transfer" / "peers.csv").rename(columns={"run": "experiment_id"})


def _transfer_sampling(layout: Path) -> pd.DataFrame:
    return _csv(layout / "transfer" / "sampling.csv")


def _public_files(layout: Path) -> pd.DataFrame:
    return _csv(layout / "public_files.csv")


def _joined_tables(layout: Path) -> pd.DataFrame:
    requests = read_requests_parquet(layout / "requests" / "requests.parquet")
    row = {
        "table": "requests",
        "rows": len(requests),
        "content_sha256": content_sha256(requests),
        "joined_from": "replay_data/*.json",
    }
    return pd.DataFrame([row])


_RUN_FILES = ("experiments/*/*.yaml", "experiments/*/results/*")
_NOT_RECORDED = "not recorded"
_RECIPES: dict[str, tuple[Callable[[Path], pd.DataFrame], tuple[str, ...], str, str]] = {
    "architectures.csv": (_architectures, ("models/*.json",), "HuggingFace config.json of each model", _NOT_RECORDED),
    "experiments.csv": (_experiments, (*_RUN_FILES, "requests/server_settings.csv"), _RUNS, _NOT_RECORDED),
    "load_stages.csv": (_load_stages, _RUN_FILES, _RUNS, _NOT_RECORDED),
    "measured.csv": (_measured, ("experiments/*/results/*.json",), _RUNS, _NOT_RECORDED),
    "published/h1_pooled.csv": (_h1_pooled, ("published/h1_correlation_results.csv",), _STUDY, _NOT_RECORDED),
    "published/h1_per_experiment.csv": (
        _h1_per_experiment,
        ("published/h1_per_experiment_correlations.csv",),
        _STUDY,
        _NOT_RECORDED,
    ),
    "published/h2.csv": (_h2, ("published/h2_evaluation_results.csv",), _STUDY, _NOT_RECORDED),
    "published/xgboost.csv": (_xgboost, ("published/xgboost_experiment_summary.csv",), _STUDY, _NOT_RECORDED),
    "published/blis_e2e.csv": (_blis, ("published/blis_e2e_results.csv",), _STUDY, _NOT_RECORDED),
    "published/peers.csv": (
        _peers,
        ("peers/simulator_predictions_ms.csv",),
        "inference-sim/sim-to-real-accuracy-validation",
        _NOT_RECORDED,
    ),
    "kernel_efficiency.csv": (summarise_kernels, (GEMM_FILE, DECODE_FILES, PREFILL_FILES), _RUNS, _NOT_RECORDED),
    "transfer/runs.csv": (_transfer_runs, ("transfer/runs.csv",), _TRANSFER, _NOT_RECORDED),
    "transfer/measured.csv": (_transfer_measured, ("transfer/measured.csv",), _TRANSFER, _NOT_RECORDED),
    "transfer/peers.csv": (_transfer_peers, ("transfer/peers.csv",), _TRANSFER, _NOT_RECORDED),
    "transfer/sampling.csv": (
        _transfer_sampling,
        ("transfer/sampling.csv",),
        "model cards and generation_config.json",
        _NOT_RECORDED,
    ),
    "catalogue/public_files.csv": (_public_files, ("public_files.csv",), _RUNS, "a column of the table"),
    "catalogue/joined_tables.csv": (
        _joined_tables,
        ("requests/requests.parquet",),
        "inference-sim/training",
        "see catalogue/public_files.csv",
    ),
}
"""Table: its maker, the files of the layout it reads, where those came from, and their commit."""


def _sources(layout: Path, tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    rows = [
        {
            "file": name,
            "rows": len(tables[name]),
            "made_from": ";".join(patterns),
            "made_from_sha256": _files_sha256(path for pattern in patterns for path in layout.glob(pattern)),
            "origin": origin,
            "commit": commit,
            "license": "see the model's card" if name == "architectures.csv" else LICENSE,
        }
        for name, (_, patterns, origin, commit) in _RECIPES.items()
    ]
    return pd.DataFrame(rows)


def _files_sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _with_canonical_model(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(model=table["model"].map(_CANONICAL_NAMES))


def _run_folders(layout: Path) -> list[Path]:
    return sorted(path for path in (layout / "experiments").iterdir() if path.is_dir())


def _csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except FileNotFoundError:
        raise InputError(f"{path} is not there: the public layout is incomplete.") from None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is not there: the public layout is incomplete.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}. Copy it again.") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no settings. Copy it again.")
    return loaded


if __name__ == "__main__":
    sys.exit(main())
