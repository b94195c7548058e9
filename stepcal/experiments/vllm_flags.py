"""vLLM's server flags by their names and spellings: which act, are refused, are noted, or change nothing.

Names are those of ``EngineArgs`` (vLLM 0.15.1 to 0.33) and of the API server. A flag that nobody knows is refused where it
is close to a known one or stands on a command line, and noted elsewhere: it is never ignored.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stepcal.errors import InputError, NotModelledError, shown

SECTIONS = ("server", "vllm", "engine", "vllm_config", "engine_args", "server_args", "vllm_args", "serve")
"""Mappings inside the file whose settings count as if they stood outside."""
ARGUMENT_LISTS = ("args", "extra_args", "vllm_args", "server_args", "engine_args", "command", "vllm_command", "cmd")
"""Keys whose value may be a command line, as a text or a list."""
SHORT_NAMES = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "dp": "data_parallel_size",
    "q": "quantization",
               "O": "optimization_level", "ep": "enable_expert_parallel", "m": "model"}  # fmt: skip
OTHER_NAMES = {"tensor_parallel": "tensor_parallel_size", "tensor_parallelism": "tensor_parallel_size",
               "pipeline_parallel": "pipeline_parallel_size", "pipeline_parallelism": "pipeline_parallel_size",
               "data_parallel": "data_parallel_size", "data_parallelism": "data_parallel_size",
               "expert_parallel": "enable_expert_parallel", "prefix_caching": "enable_prefix_caching",
               "chunked_prefill": "enable_chunked_prefill", "max_seq_len": "max_model_len",
               "gpu_memory_util": "gpu_memory_utilization"}  # fmt: skip
"""Names that people use for flags of vLLM."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ACTING = _words(
    "model tensor_parallel_size max_model_len max_num_seqs max_num_batched_tokens block_size enable_prefix_caching "
    "async_scheduling gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override kv_cache_dtype "
    "quantization dtype "
    "kv_offloading_size kv_offloading_backend vllm_version disable_hybrid_kv_cache_manager "
    "scheduling_policy long_prefill_token_threshold enable_chunked_prefill"
)
"""Flags that change what is simulated."""
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "pipeline_parallel_size": ((1,), "pipeline parallelism"),
    "data_parallel_size": ((1,), "data parallelism"),
    "prefill_context_parallel_size": ((1,), "context parallelism"),
    "decode_context_parallel_size": ((1,), "context parallelism"),
    "enable_expert_parallel": ((False,), "expert parallelism"),
    "enable_eplb": ((False,), "balancing of experts"),
    "enable_dbo": ((False,), "dual-batch overlap"),
    "speculative_config": (({},), "speculative decoding"),
    "speculative_model": ((), "speculative decoding"),
    "num_speculative_tokens": ((0,), "speculative decoding"),
    "enable_lora": ((False,), "LoRA adapters"),
    "sliding_window": ((), "a window other than that of config.json"),
    "disable_sliding_window": ((False,), "windows that are switched off; limit `max_model_len` to the window instead"),
    "kv_transfer_config": (({},), "KV connectors"),
    "ec_transfer_config": (({},), "connectors of encoders"),
    "long_prefill_token_threshold_adaptive": ((False,), "a threshold for long prefills that follows the load"),
    "max_num_partial_prefills": ((1,), "several partial prefills at a time"),
    "max_long_partial_prefills": ((1,), "several partial prefills at a time"),
    "num_scheduler_steps": ((1,), "several steps for one scheduling (vLLM V0)"),
    "scheduler_cls": (("vllm.v1.core.sched.scheduler.Scheduler",), "a scheduler of one's own"),
    "cpu_offload_gb": ((0, 0.0), "weights in CPU memory"),
    "hf_overrides": (({},), "a model whose config.json is overridden; give the config.json that results"),
    "kv_sharing_fast_prefill": ((False,), "layers that share keys and values"),
    "enable_sequence_parallel": ((False,), "sequence parallelism"),
    "performance_mode": (("balanced",), "performance modes, which double the server's limits"),
    "max_num_active_seqs": ((0,), "a limit of active sequences"),
    "prefill_schedule_interval": ((0, 1), "prefills that are scheduled at intervals"),
}
"""Flags that change scheduling or the model in ways that are not modelled, with the values that switch each off."""
NOTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "enforce_eager": ((False,), "steps run without CUDA graphs, and the step times were learned with them"),
    "compilation_config": (({},), "the step times were learned with vLLM's default compilation"),
    "optimization_level": ((2,), "the step times were learned with vLLM's default compilation"),
    "cudagraph_capture_sizes": (([],), "the step times were learned with vLLM's default CUDA graphs"),
    "max_cudagraph_capture_size": ((), "the step times were learned with vLLM's default CUDA graphs"),
    "attention_backend": ((), "the step times were learned with vLLM's default attention backend"),
    "attention_config": (({},), "the step times were learned with vLLM's default attention backend"),
    "disable_custom_all_reduce": ((False,), "the step times were learned with vLLM's own all-reduce"),
    "disable_cascade_attn": ((False,), "the step times were learned with vLLM's default attention"),
    "stream_interval": ((1,), "clients see tokens in groups, so measured gaps between them are longer"),
    "override_attention_dtype": ((), "the step times were learned with vLLM's default attention"),
    "all2all_backend": ((), "experts are not exchanged"),
    "model_impl": (("auto", "vllm"), "the step times were learned with vLLM's own models"),
    "calculate_kv_scales": ((False,), "the time of that is not modelled"),
    "distributed_executor_backend": (("mp", "ray", "uni"), "the step times were learned with processes on one machine"),
    "nnodes": ((1,), "ranks are taken to share one machine"),
    "api_server_count": ((1,), "one API server is simulated"),
    "additional_config": (({},), "what it changes is not known"),
    "worker_cls": (("auto",), "what it changes is not known"),
    "worker_extension_cls": (("",), "what it changes is not known"),
    "logits_processors": (([],), "their time is not modelled"),
    "rope_scaling": (({},), "positions beyond those of config.json are not looked at"),
    "rope_theta": ((), "positions beyond those of config.json are not looked at"),
    "env": (({},), "environment variables are not looked at"),
}
"""Flags that may change how long steps take, with their neutral values and what to know."""
SILENT = _words(
    "host port uvicorn_log_level disable_uvicorn_access_log allow_credentials allowed_origins allowed_methods "
    "allowed_headers "
    "api_key ssl_keyfile ssl_certfile ssl_ca_certs ssl_cert_reqs enable_ssl_refresh root_path middleware "
    "chat_template "
    "chat_template_content_format response_role enable_auto_tool_choice tool_call_parser tool_parser_plugin "
    "tool_server "
    "log_config_file max_log_len disable_fastapi_docs enable_request_id_headers enable_server_load_tracking "
    "enable_force_include_usage enable_tokenizer_info_endpoint enable_log_outputs enable_log_requests "
    "disable_log_requests "
    "return_tokens_as_token_ids lora_modules prompt_adapters served_model_name tokenizer tokenizer_mode "
    "tokenizer_revision "
    "tokenizer_pool_size skip_tokenizer_init trust_remote_code revision code_revision hf_token hf_config_path "
    "download_dir "
    "load_format config_format model_weights safetensors_load_strategy model_loader_extra_config ignore_patterns "
    "use_tqdm_on_load pt_load_map_location max_parallel_loading_workers runner convert task allowed_local_media_path "
    "allowed_media_domains seed swap_space max_logprobs logprobs_mode disable_log_stats aggregate_engine_logging "
    "limit_mm_per_prompt enable_mm_embeds interleave_mm_strings media_io_kwargs mm_processor_kwargs "
    "mm_processor_cache_gb "
    "mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_encoder_only mm_encoder_tp_mode "
    "mm_encoder_attn_backend "
    "io_processor_plugin skip_mm_profiling video_pruning_rate max_loras max_lora_rank default_mm_loras "
    "fully_sharded_loras "
    "max_cpu_loras lora_dtype enable_tower_connector_lora ray_workers_use_nsight disable_chunked_mm_input "
    "structured_outputs_config guided_decoding_backend reasoning_parser reasoning_parser_plugin enable_reasoning "
    "logits_processor_pattern show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces "
    "kv_cache_metrics "
    "kv_cache_metrics_sample cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics profiler_config "
    "enable_logging_iteration_details enable_mm_processor_stats pooler_config override_pooler_config "
    "kv_events_config "
    "generation_config enable_sleep_mode override_generation_config prefix_caching_hash_algo mamba_cache_dtype "
    "mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode tokens_only enable_prompt_embeds master_addr "
    "master_port node_rank "
    "data_parallel_rank data_parallel_start_rank data_parallel_size_local data_parallel_address "
    "data_parallel_rpc_port "
    "data_parallel_hybrid_lb data_parallel_external_lb data_parallel_backend dcp_kv_cache_interleave_size "
    "cp_kv_cache_interleave_size disable_nccl_for_dp_synchronization eplb_config expert_placement_strategy "
    "ubatch_size "
    "dbo_decode_token_threshold dbo_prefill_token_threshold enable_return_routed_experts "
    "allow_deprecated_quantization "
    "use_v2_block_manager step_sampling_rate otlp_endpoint headless config"
)
"""Flags that change neither what is scheduled nor how long a step takes."""
OWN_KEYS = _words(
    "model model_name gpu accelerator gpu_name gpu_type hardware tensor_parallelism tensor_parallel tp app "
    "kv_blocks_total_gpu num_gpu_blocks kv_blocks kv_blocks_total name id run experiment experiment_id description "
    "notes note "
    "comment comments date time timestamp author workload dataset image container namespace host_name hostname node "
    "version "
    "framework backend engine_version tags labels max_tokens temperature ignore_eos streaming driver_version "
    "cuda_version "
    "provider region cluster source url prompt_texts"
)
"""Keys of an ``exp-config.yaml`` itself."""
KNOWN = ACTING | frozenset(REFUSED) | frozenset(NOTED) | SILENT
_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_HUMAN = re.compile(r"^(\d+(?:\.\d+)?)([kKmMgGtT])$")


def flags_of(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a file under vLLM's names, and notes on those that may matter and do not act.

    Parameters
    ----------
    content : mapping
        A parsed ``exp-config.yaml``.
    path : Path
        What errors call it.

    Raises
    ------
    NotModelledError
        If a flag asks for what is not modelled.
    InputError
        If a flag is misspelt, given twice with different values, or unknown on a command line.
    """
    values: dict[str, Any] = {}
    strays: list[str] = []
    parts: list[Mapping[str, Any]] = [content[k] for k in SECTIONS if isinstance(content.get(k), Mapping)]
    for part in (*parts, content):
        for key, value in part.items():
            name = str(key)
            if isinstance(value, Mapping) and name in SECTIONS:
                continue
            if name in ARGUMENT_LISTS and isinstance(value, str | list):
                for flag, given in _command_line(value, path):
                    _put(values, _known_flag(flag, path), given, path)
                continue
            known, given = _known_key(name, value, path)
            if known is None:
                strays.append(name)
            else:
                _put(values, known, given, path)
    notes = _judged(values)
    if values.get("max_model_len") in (-1, "auto"):
        del values["max_model_len"]
        notes.append(
            "`max_model_len: auto` fits the limit to the memory that is left; the model's own limit was assumed."
        )
    if strays:
        listed = ", ".join(f"`{name[:40]}`" for name in sorted(strays)[:8]) + (", ..." if len(strays) > 8 else "")
        notes.append(f"{listed} of {path.name}: no setting that stepcal knows; not used.")
    return values, notes


def human_number(value: Any) -> Any:
    """Return a number written as vLLM takes it (``16k`` is 16,000, ``16K`` is 16,384); other values as they are."""
    found = _HUMAN.match(value.strip()) if isinstance(value, str) else None
    if found:
        number = float(found.group(1)) * _SUFFIXES[found.group(2)]
        return int(number) if number.is_integer() else number
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value.strip()):
        return int(value)
    return value


def _judged(values: dict[str, Any]) -> list[str]:
    """Refuse what is not modelled, and return notes on what may change the times of steps."""
    for name, (neutral, what) in REFUSED.items():
        value = values.get(name)
        if value is None or value == "" or _is_one_of(value, neutral):
            continue
        raise NotModelledError(
            f"`{name}: {shown(value)}` asks for what the simulator does not model: {what}. "
            + (f"It models `{name}: {neutral[0]}`." if neutral else f"Leave `{name}` out.")
        )
    notes = []
    for name, (neutral, what) in NOTED.items():
        value = values.get(name)
        if value is not None and value != "" and not _is_one_of(value, neutral):
            notes.append(f"`{name}: {shown(value)}` does not act: {what}.")
    return notes


def _is_one_of(value: Any, neutral: Iterable[Any]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def _put(values: dict[str, Any], name: str, value: Any, path: Path) -> None:
    if values.get(name) is not None and value is not None and values[name] != value:
        raise InputError(
            f"{path} has `{name}: {shown(values[name])}` and `{name}: {shown(value)}`, which are one setting. Keep "
            "the one "
            "that holds."
        )
    values[name] = value if value is not None else values.get(name)


def _known_key(name: str, value: Any, path: Path) -> tuple[str | None, Any]:
    """A key of a YAML file under vLLM's name, and its value; None if it is no setting."""
    plain = name.lstrip("-").replace("-", "_")
    if name in OWN_KEYS or plain in OWN_KEYS:
        return plain, value
    found, given = _negated(plain, value, path)
    if found in KNOWN:
        return found, given
    _refuse_misspelt(found, plain, path)
    return None, None


def _known_flag(flag: str, path: Path) -> str:
    """A flag of a command line under vLLM's name."""
    name = flag
    if name in KNOWN or name in OWN_KEYS:
        return name
    _refuse_misspelt(name, name, path)
    raise InputError(
        f"{path}: `--{name.replace('_', '-')[:60]}` is no flag of vLLM's server that stepcal knows. Drop it, or "
        "correct it."
    )


def _negated(name: str, value: Any, path: Path) -> tuple[str, Any]:
    """A name without its ``no_``, and the value turned round; other names of a flag under vLLM's."""
    own = OTHER_NAMES.get(name, name)
    if own in KNOWN or not name.startswith(("no_", "disable_")):
        return own, value
    positive = name.removeprefix("no_").removeprefix("disable_")
    positive = positive if positive in KNOWN else f"enable_{positive}"
    if positive not in KNOWN:
        return own, value
    if value is None:
        return positive, None
    if not isinstance(value, bool):
        raise InputError(f"{path}: `{name}` is {shown(value)}; it must be true or false.")
    return positive, not value


def _refuse_misspelt(name: str, written: str, path: Path) -> None:
    close = difflib.get_close_matches(
        name[:60], sorted(ACTING | frozenset(REFUSED) | frozenset(NOTED)), n=1, cutoff=0.85
    )
    if close:
        raise InputError(f"{path}: `{written[:60]}` is no setting of vLLM's server. Did you mean `{close[0]}`?")


def _command_line(given: str | list[Any], path: Path) -> Iterator[tuple[str, Any]]:
    """Flags and values of a command line; a flag without a value is true."""
    try:
        words = shlex.split(given) if isinstance(given, str) else [str(word) for word in given]
    except ValueError as error:
        raise InputError(f"{path}: the server's arguments cannot be split into words: {error}.") from None
    if isinstance(given, list) and any(" " in word and word.startswith("-") for word in words):
        words = [part for word in words for part in (shlex.split(word) if word.startswith("-") else [word])]
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("-") or _is_number(word):
            continue  # `vllm serve MODEL`
        name, equals, value = word.lstrip("-").partition("=")
        if (
            not equals
            and position < len(words)
            and (not words[position].startswith("-") or _is_number(words[position]))
        ):
            value, equals = words[position], "="
            position += 1
        plain = SHORT_NAMES.get(name, name.replace("-", "_"))
        plain = plain.partition(".")[0]  # `--compilation-config.level 3`
        yield _negated(plain, _parsed(value) if equals else True, path)


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", word) is not None


def _parsed(text: str) -> Any:
    """The value of a flag: JSON where it is some, else a number as people write it, else text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, human_number(text))
