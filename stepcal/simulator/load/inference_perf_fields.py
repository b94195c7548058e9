"""What the fields of an inference-perf configuration mean, since which release, and what stepcal does with each.

Every release writes its whole configuration beside its results, most fields null. A field that is null, false or empty asks
for nothing and is accepted, known or not; one with a value is read, known to change nothing, or refused by name.
"""

from dataclasses import dataclass
from typing import Any

READ = "read"
SILENT = "changes no request"
FIXED = "must have one of these values"


@dataclass(frozen=True)
class Field:
    """One field of the configuration.

    Attributes
    ----------
    section, name : str
        Section with dots, empty at the top.
    since : str
        First release of inference-perf that writes it.
    treatment : str
        `READ`, `SILENT` or `FIXED`.
    meaning : str
    values : tuple
        Of a `FIXED` field, the values that are modelled; null always is.
    """

    section: str
    name: str
    since: str
    treatment: str
    meaning: str
    values: tuple[Any, ...] = ()


FIELDS = (
    Field("", "api", "0.1", READ, "protocol of the requests"),
    Field("", "data", "0.1", READ, "prompts"),
    Field("", "load", "0.1", READ, "arrivals"),
    Field("", "server", "0.1", READ, "server that is asked"),
    Field("", "metrics", "0.1", SILENT, "where server metrics come from"),
    Field("", "report", "0.1", SILENT, "which reports are written"),
    Field("", "storage", "0.1", SILENT, "where reports go"),
    Field("", "tokenizer", "0.1", SILENT, "tokeniser that makes and counts prompts"),
    Field("", "circuit_breakers", "0.3", SILENT, "conditions under which a run is stopped"),
    Field("api", "type", "0.1", FIXED, "completion or chat", ("completion", "chat")),
    Field("api", "streaming", "0.1", SILENT, "whether tokens come one by one; without, clients see no first token"),
    Field("api", "headers", "0.2", SILENT, "headers of each request"),
    Field("api", "slo_unit", "0.5", SILENT, "unit of the latency targets in headers"),
    Field("api", "slo_tpot_header", "0.5", SILENT, "header of the target"),
    Field("api", "slo_ttft_header", "0.5", SILENT, "header of the target"),
    Field("api", "response_format", "0.5", FIXED, "structured output, which constrains decoding"),
    Field("data", "type", "0.1", FIXED, "kind of prompts", ("shared_prefix",)),
    Field("data", "path", "0.1", FIXED, "file of prompts"),
    Field("data", "input_distribution", "0.1", FIXED, "distribution of prompt lengths"),
    Field("data", "output_distribution", "0.1", FIXED, "distribution of output lengths"),
    Field("data", "shared_prefix", "0.2", READ, "groups of prompts with a common system prompt"),
    Field("data", "trace", "0.3", FIXED, "trace whose lengths are replayed"),
    Field("data", "otel_trace_replay", "0.5", FIXED, "OpenTelemetry trace that is replayed"),
    Field("data", "conversation_replay", "0.5", FIXED, "conversations that are replayed"),
    Field("data.shared_prefix", "num_groups", "0.2", READ, "system prompts (0.2, 0.3)"),
    Field("data.shared_prefix", "num_unique_system_prompts", "0.4", READ, "the same, since 0.4"),
    Field("data.shared_prefix", "num_prompts_per_group", "0.2", READ, "questions about each system prompt (0.2, 0.3)"),
    Field("data.shared_prefix", "num_users_per_system_prompt", "0.4", READ, "the same, since 0.4"),
    Field("data.shared_prefix", "system_prompt_len", "0.2", READ, "tokens of a system prompt"),
    Field("data.shared_prefix", "question_len", "0.2", READ, "tokens of a question"),
    Field("data.shared_prefix", "output_len", "0.2", READ, "tokens that are asked for"),
    Field("data.shared_prefix", "enable_multi_turn_chat", "0.3", READ, "each question carries the conversation so far"),
    Field("data.shared_prefix", "seed", "0.5", SILENT, "seed of the prompts' words"),
    Field("data.shared_prefix", "question_distribution", "0.5", FIXED, "distribution of question lengths"),
    Field("data.shared_prefix", "output_distribution", "0.5", FIXED, "distribution of output lengths"),
    Field("load", "type", "0.1", FIXED, "arrival process", ("constant", "poisson", "concurrent")),
    Field("load", "interval", "0.1", READ, "pause after a stage has ended, seconds (1 where absent)"),
    Field("load", "stages", "0.1", READ, "rates and durations, one stage after the other"),
    Field("load", "sweep", "0.2", FIXED, "rates that are chosen while it runs"),
    Field("load", "num_workers", "0.1", READ, "processes that send; times the next it caps the requests in flight"),
    Field("load", "worker_max_concurrency", "0.1", READ, "requests in flight of one process (100 where absent)"),
    Field("load", "worker_max_tcp_connections", "0.1", SILENT, "connections of one process, above the cap by default"),
    Field("load", "trace", "0.3", FIXED, "trace whose arrivals are replayed"),
    Field("load", "circuit_breakers", "0.3", SILENT, "conditions under which a run is stopped"),
    Field("load", "request_timeout", "0.3", READ, "seconds after which a client gives up"),
    Field("load", "lora_traffic_split", "0.4", FIXED, "shares of requests for LoRA adapters"),
    Field("load", "base_seed", "0.5", SILENT, "seed of the arrivals"),
    Field("load.stages", "rate", "0.1", READ, "requests a second"),
    Field(
        "load.stages", "duration", "0.1", READ, "seconds; rate times duration is cut off to a whole number of requests"
    ),
    Field("load.stages", "num_requests", "0.3", READ, "requests of a stage of fixed concurrency"),
    Field("load.stages", "concurrency_level", "0.3", READ, "requests in flight of such a stage"),
    Field("server", "type", "0.1", FIXED, "server", ("vllm",)),
    Field("server", "model_name", "0.1", SILENT, "model that is asked for"),
    Field("server", "base_url", "0.1", SILENT, "address"),
    Field("server", "ignore_eos", "0.1", FIXED, "whether answers have exactly the length asked for", (True,)),
    Field("server", "api_key", "0.2", SILENT, "key of the server"),
    Field("server", "cert_path", "0.4", SILENT, "certificate of the client"),
    Field("server", "key_path", "0.4", SILENT, "its key"),
)
"""Fields of releases 0.2 to 0.6 and main, as their configuration classes have them."""


def fields_of(section: str) -> dict[str, Field]:
    """Return the fields of a section, by name."""
    return {field.name: field for field in FIELDS if field.section == section}
