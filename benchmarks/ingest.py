"""Speed and memory of `stepcal ingest` on OTLP request spans: ``python benchmarks/ingest.py --gb 2``."""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from stepcal.ingest import ingest

SPANS_A_LINE = 10
GAP_NS, LATENCY_S = 50_000_000, 3.3
TEXTS = {"gen_ai.response.model": "meta-llama/Llama-3.1-8B-Instruct", "gen_ai.request.id": "cmpl-0123456789abcdef-0"}
COUNTS = {"gen_ai.request.max_tokens": 248, "gen_ai.usage.prompt_tokens": 547, "gen_ai.usage.completion_tokens": 248}
NUMBERS = {
    "gen_ai.request.temperature": 0.0,
    "gen_ai.request.top_p": 1.0,
    "gen_ai.latency.time_in_queue": 0.00123,
    "gen_ai.latency.time_to_first_token": 0.0412345,
    "gen_ai.latency.e2e": LATENCY_S,
    "gen_ai.latency.time_in_model_prefill": 0.0312,
    "gen_ai.latency.time_in_model_decode": 3.27,
    "gen_ai.latency.time_in_model_inference": 3.30,
}


def span(i: int) -> dict[str, object]:
    attributes = [{"key": k, "value": {"stringValue": v}} for k, v in TEXTS.items()]
    attributes += [{"key": k, "value": {"intValue": str(v)}} for k, v in COUNTS.items()]
    attributes += [{"key": k, "value": {"doubleValue": v}} for k, v in NUMBERS.items()]
    start = 1_790_000_000_000_000_000 + i * GAP_NS
    return {
        "traceId": f"{i:032x}",
        "spanId": f"{i:016x}",
        "name": "llm_request",
        "kind": 2,
        "startTimeUnixNano": str(start),
        "endTimeUnixNano": str(start + int(LATENCY_S * 1e9)),
        "attributes": attributes,
        "status": {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=0.2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, size, i = Path(folder) / "spans.jsonl", 0, 0
        with path.open("wb") as stream:
            while size < arguments.gb * 1e9:
                scope = {"scope": {"name": "vllm"}, "spans": [span(i + j) for j in range(SPANS_A_LINE)]}
                line = json.dumps({"resourceSpans": [{"resource": {}, "scopeSpans": [scope]}]}).encode() + b"\n"
                size, i = size + stream.write(line), i + SPANS_A_LINE
        began = time.process_time()
        manifest = ingest([path], Path(folder) / "out")
        spent = time.process_time() - began
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{size / 1e9:.2f} GB, {manifest['requests']:,} requests: {size / 1e6 / spent:.0f} MB/s of one core, "
        f"{peak_mb:.0f} MiB peak"
    )


if __name__ == "__main__":
    main()
