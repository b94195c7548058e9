"""Folders of small invented runs, laid out as the load generator leaves them."""

import json
from pathlib import Path

import yaml

SERVER = {
    "model": "meta-llama/Llama-2-7b-hf",
    "tensor_parallelism": 1,
    "max_model_len": 4096,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 128,
    "kv_blocks_total_gpu": 7462,
    "vllm_version": "0.15.1",
}
PROFILE = {
    "api": {"type": "completion", "streaming": True},
    "data": {
        "type": "shared_prefix",
        "shared_prefix": {
            "num_unique_system_prompts": 2,
            "num_users_per_system_prompt": 3,
            "system_prompt_len": 100,
            "question_len": 50,
            "output_len": 21,
        },
    },
    "load": {"type": "constant", "stages": [{"rate": 4, "duration": 10}, {"rate": 8, "duration": 10}]},
    "server": {"type": "vllm", "ignore_eos": True},
}
QWEN = {
    "_name_or_path": "mine/tiny",
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": 1000,
    "torch_dtype": "bfloat16",
}


def summary(completed: int = 100, failed: int = 0, requests_per_s: float = 4.0, e2e_s: float = 1.0) -> dict:
    def seconds(value: float) -> dict:
        return {"mean": value, "median": value, "p90": value * 2, "p99": value * 3}

    if not completed:
        return {"load_summary": {"count": failed}, "successes": {"count": 0}, "failures": {"count": failed}}
    latencies = ("request_latency", "time_to_first_token", "inter_token_latency", "time_per_output_token")
    return {
        "load_summary": {"count": completed + failed},
        "successes": {
            "count": completed,
            "latency": {key: seconds(e2e_s if key == "request_latency" else e2e_s / 10) for key in latencies},
            "prompt_len": seconds(150.0),
            "output_len": seconds(21.0),
            "throughput": {
                "requests_per_sec": requests_per_s,
                "input_tokens_per_sec": 1.0,
                "output_tokens_per_sec": 1.0,
                "total_tokens_per_sec": 2.0,
            },
        },
        "failures": {"count": failed},
    }


def write_run(
    folder: Path, name: str = "run-a", *, server: dict | None = None, files: dict[str, object] | None = None
) -> Path:
    """One run; `files` adds or (with None) leaves out files, by path."""
    run = folder / name
    (run / "results").mkdir(parents=True)
    content: dict[str, object] = {
        "exp-config.yaml": server or SERVER,
        "profile.yaml": PROFILE,
        "results/summary_lifecycle_metrics.json": summary(),
        "results/stage_0_lifecycle_metrics.json": summary(50, requests_per_s=3.99),
        "results/stage_1_lifecycle_metrics.json": summary(50, requests_per_s=7.9),
        **(files or {}),
    }
    for path, value in content.items():
        if isinstance(value, str):
            (run / path).write_text(value)
        elif value is not None:
            (run / path).write_text(json.dumps(value) if path.endswith("json") else yaml.safe_dump(value))
    return run
