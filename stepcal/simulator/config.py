"""The server as the simulator sees it: the limits of vLLM's scheduler. What is not modelled is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from stepcal.errors import InputError, NotModelledError, shown
from stepcal.simulator.versions import OLDEST, VllmRelease, release_of

MOST = {"max_num_seqs": 10**6, "max_num_batched_tokens": 2**24, "max_model_len": 10**9, "block_size": 10**6}
MOST_BLOCKS = 2**27
"""Bounds far above any server, within which the simulator's tables fit into memory."""
BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)
"""Tokens of a KV block that vLLM takes (``BlockSize`` in vllm/config/cache.py)."""

# vLLM's engine arguments that change scheduling in ways the simulator does not model, with the value that switches
# each off.
NOT_MODELLED: dict[str, tuple[Any, str]] = {
    "pipeline_parallel_size": (1, "pipeline parallelism"),
    "data_parallel_size": (1, "data parallelism"),
    "enable_expert_parallel": (False, "expert parallelism"),
    "speculative_config": (None, "speculative decoding"),
    "enable_lora": (False, "LoRA adapters"),
    "sliding_window": (None, "sliding-window attention"),
    "kv_transfer_config": (None, "KV connectors"),
    "kv_offloading_size": (None, "a pool in GiB, which needs the model; give its blocks as `offload_blocks`"),
    "scheduling_policy": ("fcfs", "scheduling policies other than first come, first served"),
    "enable_chunked_prefill": (True, "scheduling without chunked prefill"),
    "long_prefill_token_threshold": (0, "a threshold for long prefills"),
}


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Scheduler limits of one vLLM server.

    Parameters
    ----------
    kv_blocks : int
        KV blocks in all, as vLLM logs and traces them. One of them is vLLM's null block, so ``kv_blocks - 1`` can be
        used.
    max_num_seqs : int
        Most requests that run at the same time.
    max_num_batched_tokens : int
        Token budget of a step.
    max_model_len : int
        Most tokens of a request, prompt and output together.
    block_size : int
        Tokens of a KV block.
    enable_prefix_caching : bool
    offload_blocks : int
        KV blocks that the pool in CPU memory can hold, 0 without KV offloading.
    async_scheduling : bool
        Whether a step is scheduled while the one before it runs (vLLM's default).
    vllm_version : str
        Release of vLLM, see `stepcal.simulator.versions`. By default 0.15.1, which the study's runs had.

    Raises
    ------
    InputError
        If a limit is not positive, or the token budget is below the sequence limit.
    NotModelledError
        If the release is older than all recorded ones.
    """

    kv_blocks: int
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096
    block_size: int = 16
    enable_prefix_caching: bool = True
    offload_blocks: int = 0
    async_scheduling: bool = True
    vllm_version: str = OLDEST

    def __post_init__(self) -> None:
        release_of(self.vllm_version)
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"`{name}` is {value}; it must be at least 1.")
            if value > MOST[name]:
                raise InputError(f"`{name}` is {shown(value)}; it must be at most {MOST[name]:,}.")
        for name in ("kv_blocks", "offload_blocks"):
            if getattr(self, name) > MOST_BLOCKS:
                raise InputError(f"`{name}` is {shown(getattr(self, name))}; it must be at most {MOST_BLOCKS:,}.")
        if self.offload_blocks < 0:
            raise InputError(f"`offload_blocks` is {self.offload_blocks}; it must be at least 0 (no KV offloading).")
        if self.kv_blocks < 2:
            raise InputError(
                f"`kv_blocks` is {self.kv_blocks}; it must be at least 2, because vLLM keeps one as its "
                "null block. vLLM logs the number at start-up (`num_gpu_blocks`)."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InputError(
                f"`max_num_batched_tokens` ({self.max_num_batched_tokens}) is below `max_num_seqs` "
                f"({self.max_num_seqs}): a step could not give each running request a token, and vLLM refuses it. "
                "Raise the budget or lower the limit."
            )

    @property
    def usable_blocks(self) -> int:
        """KV blocks that requests can hold."""
        return self.kv_blocks - 1

    @property
    def release(self) -> VllmRelease:
        """The recorded release of vLLM that this server is simulated as."""
        return release_of(self.vllm_version)

    @classmethod
    def from_vllm_arguments(cls, arguments: Mapping[str, Any]) -> "ServerConfig":
        """Build from vLLM engine arguments, by their names; whatever is not modelled is refused.

        Parameters
        ----------
        arguments : mapping
            Fields of this class (`kv_blocks` may be called ``num_gpu_blocks_override``), and arguments of
            `NOT_MODELLED` as long as they are off. Ranks that share a step (``tensor_parallel_size``) belong to the
            step time, not here.

        Raises
        ------
        NotModelledError
            If an argument asks for something that is not modelled.
        InputError
            If an argument is unknown.
        """
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in arguments.items():
            if name in NOT_MODELLED:
                neutral, what = NOT_MODELLED[name]
                if value is not None and value != neutral:
                    raise NotModelledError(
                        f"`{name}: {value}` asks for what the simulator does not model: {what}. "
                        f"It models vLLM with `{name}: {neutral}`."
                    )
            elif name == "num_gpu_blocks_override":
                values["kv_blocks"] = value
            elif name in known:
                values[name] = value
            elif name != "tensor_parallel_size":
                raise InputError(
                    f"Unknown server argument `{name}`. Known: {', '.join(sorted(known | NOT_MODELLED.keys()))}."
                )
        return cls(**values)


def check_block_size(block_size: int) -> int:
    """Return `block_size` if vLLM takes it; the simulator itself takes any.

    Raises
    ------
    InputError
        If it does not.
    """
    if block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        least = "it must be at least 1, and " if block_size < 1 else ""
        raise InputError(f"`block_size` is {shown(block_size)}; {least}vLLM takes {sizes}.")
    return block_size
