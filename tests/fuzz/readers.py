"""Every reader of a file, with good files to damage. A reader must return, or raise one of stepcal's own errors."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from run_folders import PROFILE, QWEN, SERVER, summary

from stepcal.datasets import read_lifecycle_per_request, read_lifecycle_summary, read_requests_parquet, read_steps
from stepcal.datasets.request_traces import read_request_trace
from stepcal.experiments.engine_args import read_settings, served_architecture, server_of, tensor_parallel_of
from stepcal.experiments.folders import read_usable_runs
from stepcal.ingest.formats import Options
from stepcal.ingest.tools import FORMATS
from stepcal.simulator import read_workload, replay_trace
from stepcal.specs.architecture import load_architecture, resolve_architecture
from stepcal.specs.hardware import load_accelerator
from stepcal.step_time.coefficients import load_coefficients

AS_RUN = Path(__file__).parent.parent / "simulator" / "as_run"
TOOL_FILES = Path(__file__).parent.parent / "ingest" / "files"
MODELS = Path(__file__).parent.parent / "specs" / "public_models.jsonl"


@dataclass(frozen=True)
class Reader:
    """One reader: the file it reads, good contents of it, and what reads it."""

    name: str
    file: str
    seeds: tuple[bytes, ...]
    read: Callable[[Path], object]


def _architecture(path: Path) -> object:
    read = resolve_architecture(str(path), max_model_len=512)
    return read.num_parameters(), read.weights_bytes(), read.tensor_parallel_degrees()


def _settings(path: Path) -> object:
    settings = read_settings(path.parent)
    architecture, _ = served_architecture(settings, load_architecture("llama-2-7b"))
    degree, _ = tensor_parallel_of(settings)
    return server_of(settings, architecture, load_accelerator("h100-sxm"), tensor_parallel=degree)


def _ingested(name: str) -> Callable[[Path], object]:
    return lambda path: sum(1 for _ in FORMATS[name].read(path, Options()))


def _json(*documents: object) -> tuple[bytes, ...]:
    return tuple(json.dumps(document).encode() for document in documents)


def _lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


def _request_rows() -> pd.DataFrame:
    n = 30
    return pd.DataFrame(
        {
            "experiment_id": "run-a", "index": np.arange(n), "arrival_time_us": np.arange(n) * 1000, "prompt_tokens": 50,
            "output_tokens": 20, "has_error": False, "e2e_s": 1.0, "ttft_s": 0.1,
        }
    )  # fmt: skip


def _step_rows() -> pd.DataFrame:
    n = np.arange(20)
    return pd.DataFrame(
        {
            "experiment_id": "run-a", "model": "m", "workload": "w", "tensor_parallel": 1, "step_id": n,
            "duration_us": 9000.0, "ts_start_ns": n * 10**7, "ts_end_ns": n * 10**7 + 9 * 10**6, "prefill_tokens": 5,
            "decode_tokens": 3, "num_prefill_reqs": 1, "num_decode_reqs": 3, "num_finished": 0, "running_depth": 4,
            "waiting_depth": 0, "num_preempted": 0, "kv_blocks_total": 100, "kv_blocks_free": 50,
        }
    )  # fmt: skip


def _otlp() -> bytes:
    from stepcal.datasets.steps_layout import STEP_ATTRIBUTES

    columns = set(_step_rows().columns)
    names = [name for name, column in STEP_ATTRIBUTES.items() if column in columns]
    attributes = [{"key": name, "value": {"intValue": "100"}} for name in names]
    event = {"name": "step.BATCH_SUMMARY", "attributes": attributes}
    export = {"resourceSpans": [{"scopeSpans": [{"spans": [{"events": [event]}]}]}]}
    return _lines([export])


def _bench() -> dict:
    return {
        "duration": 10.0, "completed": 2, "request_rate": "inf", "max_concurrency": None, "input_lens": [5, 6],
        "output_lens": [3, 4], "ttfts": [0.1, 0.2], "itls": [[0.1, 0.1], [0.1, 0.1, 0.1]], "start_times": [0.0, 0.5],
        "errors": ["", ""], "mean_ttft_ms": 150.0, "mean_tpot_ms": 100.0, "mean_e2el_ms": 400.0,
    }  # fmt: skip


def _llmservingsim() -> list[dict]:
    return [
        {"input_toks": 9, "output_toks": 4, "arrival_time": 1.7e9 + i, "queued_ts": 1.0 + i, "scheduled_ts": 1.1 + i,
         "first_token_ts": 1.2 + i, "last_token_ts": 2.0 + i}
        for i in range(3)
    ]  # fmt: skip


def _tools(request: dict) -> dict[str, tuple[str, tuple[bytes, ...]]]:
    """Files of load generators, by their format: those that the tools wrote themselves, and invented ones."""
    made = {path.name.partition("_")[0]: path.read_bytes() for path in sorted(TOOL_FILES.iterdir())}
    benchmarks = json.loads(made["guidellm"])
    for benchmark in benchmarks["benchmarks"]:
        benchmark["requests"] = {kind: rows[:2] for kind, rows in benchmark["requests"].items() if rows}
    spans = [
        {
            "startTimeUnixNano": "1000000000",
            "attributes": [
                {"key": "gen_ai.usage.prompt_tokens", "value": {"intValue": "100"}},
                {"key": "gen_ai.usage.completion_tokens", "value": {"intValue": 11}},
                {"key": "gen_ai.latency.time_to_first_token", "value": {"doubleValue": 0.5}},
                {"key": "gen_ai.latency.e2e", "value": {"doubleValue": 1.5}},
            ],
        }
    ]
    llmperf = [
        {
            "error_code": None,
            "number_input_tokens": 100,
            "number_output_tokens": 11,
            "ttft_s": 0.5,
            "end_to_end_latency_s": 1.5,
            "inter_token_latency_s": 0.136,
        }
    ]
    sglang = {
        "server_info": {},
        "input_lens": [9],
        "output_lens": [3],
        "ttfts": [0.5],
        "itls": [[0.4, 0.6]],
        "errors": [""],
    }
    blis = (
        b"version: 2\n---\nrequest_id,session_id,input_tokens,output_tokens,arrival_time_us,send_time_us,"
        b"first_chunk_time_us,last_chunk_time_us,status\n1,,100,11,0,100,500100,1500100,ok\n"
    )
    return {
        "vllm-bench": ("bench.json", (*_json(_bench()), made["vllm"])),
        "guidellm": ("benchmarks.json", _json(benchmarks)),
        "aiperf": ("profile_export.jsonl", (b"\n".join(made["aiperf"].splitlines()[:3]) + b"\n",)),
        "inference-perf": ("per_request_lifecycle_metrics.json", _json([request] * 3)),
        "otlp": ("spans.jsonl", (_lines([{"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}]),)),
        "llmperf": ("individual_responses.json", _json(llmperf)),
        "llmservingsim": ("requests.jsonl", (_lines(_llmservingsim()),)),
        "sglang": ("bench.jsonl", (_lines([sglang]),)),
        "blis-trace": ("trace.csv", (blis,)),
    }  # fmt: skip


def readers() -> tuple[Reader, ...]:
    """Return every reader with its seeds."""
    request = {"start_time": 1.0, "end_time": 1.5, "request": "", "response": "", "error": None,
               "info": {"input_tokens": 3, "output_tokens": 2, "output_token_times": [1.1, 1.5]}}  # fmt: skip
    newer = {**request, "info": {"response_metrics": {"output_tokens": 2, "output_token_times": []}, "input_tokens": 3}}
    mooncake = [{"timestamp": i, "input_length": 600, "output_length": 9, "hash_ids": [1, i]} for i in range(5)]
    azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2023-11-16 18:15:46.6805900,374,44\n" * 4
    coefficients = {
        "variant": "affine",
        "parameters": [{"name": n, "value": 9.0} for n in ("constant_us", "kv_us")],
    }
    models = [json.loads(line)["config"] for line in MODELS.read_text().splitlines()]
    quantised = {
        **models[1],
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "ignore": ["lm_head", "re:.*self_attn.*"],
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128, "type": "int"}}
            },
        },
    }
    settings = {**SERVER, "args": ["--max-num-seqs", "128", "--no-enable-prefix-caching"], "vllm": {"dtype": "half"}}
    servers = (yaml.safe_dump(settings).encode(), yaml.safe_dump(SERVER).encode())
    workloads = tuple(path.read_bytes() for path in sorted(AS_RUN.glob("*.yaml")))
    profile = yaml.safe_dump(PROFILE).encode()

    def trace(path: Path) -> object:
        return replay_trace(read_request_trace(path).table)

    return (
        Reader("architecture", "config.json", _json(*models, quantised), _architecture),
        Reader("coefficients", "mine.json", _json(coefficients), lambda p: load_coefficients(str(p))),
        Reader("workload", "config.yaml", (*workloads, profile), lambda p: read_workload(p).clients()),
        Reader("server settings", "exp-config.yaml", servers, _settings),
        Reader("summary", "summary_lifecycle_metrics.json", _json(summary()), read_lifecycle_summary),
        Reader("requests of inference-perf", "per_request_lifecycle_metrics.json", _json([request] * 4, [newer] * 2),
               lambda p: read_lifecycle_per_request(p, experiment_id="run")),
        Reader("trace, CSV", "trace.csv", (azure.encode(), _request_rows().to_csv(index=False).encode()), trace),
        Reader("trace, JSON lines", "trace.jsonl", (_lines(mooncake), _lines(_llmservingsim())), trace),
        Reader("trace, parquet", "trace.parquet", (_parquet(_request_rows().drop(columns=["e2e_s", "ttft_s"])),), trace),
        Reader("request table", "requests.parquet", (_parquet(_request_rows()),), read_requests_parquet),
        Reader("step table", "steps.parquet", (_parquet(_step_rows()),), read_steps),
        Reader("step trace, OTLP", "steps.jsonl", (_otlp(),), lambda p: read_steps(
            p, experiment_id="e", model="m", workload="w", tensor_parallel=1)),
        Reader("run folder", "run-a/exp-config.yaml", servers, _run),
        *(Reader(f"ingest {name}", file, seeds, _ingested(name)) for name, (file, seeds) in _tools(request).items()),
    )  # fmt: skip


def _run(path: Path) -> object:
    run = path.parent
    (run / "results").mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps(QWEN))
    (run / "profile.yaml").write_text(yaml.safe_dump(PROFILE))
    (run / "results" / "summary_lifecycle_metrics.json").write_text(json.dumps(summary()))
    return read_usable_runs(run.parent)
