"""The server as the simulator sees it: the limits of vLLM's scheduler. What is not modelled is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, NamedTuple

import numpy as np

from stepcal.errors import InputError, NotModelledError, shown
from stepcal.simulator.versions import OLDEST, VllmRelease, release_of
from stepcal.units import IntArray

SCHEDULING_POLICIES = ("fcfs", "priority")
KV_KINDS = ("full", "sliding", "chunked")

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
    "sliding_window": (None, "sliding-window attention without the layers that have it; give `kv_groups`"),
    "kv_transfer_config": (None, "KV connectors"),
    "kv_offloading_size": (None, "a pool in GiB, which needs the model; give its blocks as `offload_blocks`"),
    "long_prefill_token_threshold_adaptive": (False, "a threshold for long prefills that follows the load"),
}


@dataclass(frozen=True)
class KvGroup:
    """A group of layers that share blocks: all read the same of what lies before a token.

    Parameters
    ----------
    kind : {"full", "sliding", "chunked"}
    window : int
        Tokens that a layer reads, the present one included ("sliding"), or of a chunk ("chunked"); 0 for "full".
    layers : int
        Layers of the group; they say what share of the model reads a window.

    Raises
    ------
    InputError
        If the kind is unknown, or a window is missing or has no use.
    """

    kind: str = "full"
    window: int = 0
    layers: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KV_KINDS:
            raise InputError(f"`kind` of a KV group is {self.kind!r}; it must be one of {', '.join(KV_KINDS)}.")
        if self.window < 0 or (self.window < 2) != (self.kind == "full"):
            raise InputError(
                f"`window` of a KV group of kind `{self.kind}` is {self.window}; a window needs at least 2 tokens, and "
                "full attention has none (0)."
            )

    def tokens_read(self, context: IntArray) -> IntArray:
        """Tokens that a layer reads for the token that ends each context, shape of `context`.

        Examples
        --------
        >>> KvGroup("sliding", 4).tokens_read(np.arange(1, 7)).tolist()
        [1, 2, 3, 4, 4, 4]
        """
        if self.kind == "sliding":
            return np.minimum(context, self.window)
        return (context - 1) % self.window + 1 if self.kind == "chunked" else context


class _Kind(NamedTuple):
    """What a field of `ServerConfig` may hold."""

    types: tuple[type, ...]
    words: str


_KINDS: dict[Any, _Kind] = {
    int: _Kind((int, np.integer), "a whole number"),
    bool: _Kind((bool, np.bool_), "True or False"),
    bool | None: _Kind((bool, np.bool_, NoneType), "True, False or None"),
    str: _Kind((str,), "text"),
    tuple[KvGroup, ...]: _Kind((tuple,), "a tuple of `KvGroup`"),
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
        KV blocks that the pool in CPU memory can hold, 0 without KV offloading. It costs time only in releases that hold
        blocks there until their request ends.
    async_scheduling : bool
        Whether a step is scheduled while the one before it runs (vLLM's default).
    vllm_version : str
        Release of vLLM, see `stepcal.simulator.versions`. By default 0.15.1, which the study's runs had.
    kv_groups : tuple of KvGroup
        Groups of layers where layers differ in what they read (hybrid KV cache), in vLLM's order; by default one, with
        full attention.
    disable_hybrid_kv_cache_manager : bool, optional
        Whether the KV of all layers is kept as if they had full attention; windows then still save time, but no blocks. By
        default as vLLM decides: so with KV offloading in releases before 0.24.0.
    scheduling_policy : {"fcfs", "priority"}
        Who is served first: who came first, or whose `RequestList.priority` is smallest, and of these who came first.
    long_prefill_token_threshold : int
        Most tokens of one request in a step, 0 for no limit.
    enable_chunked_prefill : bool
        Whether a prompt may begin with what is left of a step's token budget (vLLM's default). If not, it waits until all
        of it fits, or as much as the threshold allows.

    Raises
    ------
    InputError
        If a limit is not positive, the token budget is below the sequence limit, or vLLM refuses the groups.
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
    kv_groups: tuple[KvGroup, ...] = (KvGroup(),)
    disable_hybrid_kv_cache_manager: bool | None = None
    scheduling_policy: str = "fcfs"
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True

    def __post_init__(self) -> None:
        self._check_types()
        release_of(self.vllm_version)
        self._check_groups()
        self._check_policy()
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

    def _check_types(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), _KINDS[field.type]
            if isinstance(value, kind.types) and (bool in kind.types or not isinstance(value, bool | np.bool_)):
                continue
            raise InputError(f"`{field.name}` is {value!r}; it must be {kind.words}.")

    def _check_policy(self) -> None:
        if self.scheduling_policy not in SCHEDULING_POLICIES:
            raise InputError(
                f"`scheduling_policy` is {self.scheduling_policy!r}; it must be one of {', '.join(SCHEDULING_POLICIES)}."
            )
        threshold = self.long_prefill_token_threshold
        most = self.max_model_len if self.release.bounds_long_prefill_threshold else MOST["max_model_len"]
        if not 0 <= threshold <= most:
            raise InputError(
                f"`long_prefill_token_threshold` is {shown(threshold)}; it must be from 0 (no limit) to {most} "
                f"(`max_model_len`, or what can be simulated)."
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise InputError(
                f"`max_num_batched_tokens` ({self.max_num_batched_tokens}) is below `max_model_len` ({self.max_model_len}): "
                "without chunked prefill the longest prompt would not fit into a step, and vLLM refuses it. Raise the "
                "budget, or lower `max_model_len`."
            )

    def _check_groups(self) -> None:
        kinds = [(group.kind, group.window) for group in self.kv_groups]
        if not kinds:
            raise InputError("`kv_groups` is empty; a model has at least one group of layers.")
        runs = [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
        if len(set(runs)) < len(runs) or (len(kinds) > 1 and len(runs) == 1):
            raise InputError(
                "`kv_groups` is not in vLLM's order: groups of layers that are alike stand side by side, and layers "
                "that are all alike are one group. `stepcal.specs.layer_windows` makes the groups of a model."
            )
        is_on = self.disable_hybrid_kv_cache_manager is False
        if is_on and self.offload_blocks > 0 and self.release.drops_groups_with_connector:
            raise InputError(
                f"`disable_hybrid_kv_cache_manager` is False with KV offloading, and vLLM {self.vllm_version} refuses to "
                "start: its connector does not support the hybrid KV cache manager. Leave it out, or set it to True."
            )
        if not self.is_hybrid_cache_off:
            return
        windows = {kind for kind in kinds if kind[0] != "full"}
        has_two_sizes = len({kind for kind, _ in windows}) < len(windows)
        if has_two_sizes or (len(windows) > 1 and len(windows) == len(set(kinds))):
            raise InputError(
                f"`kv_groups` has windows of {len(windows)} kinds or sizes, which vLLM refuses to keep as if they were full "
                "attention, as it does without its hybrid KV cache manager "
                f"(`disable_hybrid_kv_cache_manager`, or KV offloading in vLLM {self.vllm_version})."
            )

    @property
    def pool_blocks(self) -> int:
        """KV blocks of the pool in CPU memory, 0 where the release gives them back once they are copied."""
        return self.offload_blocks if self.release.holds_offloaded_blocks else 0

    @property
    def is_hybrid_cache_off(self) -> bool:
        """Whether the KV of all layers is kept as if they had full attention, where some have."""
        if self.disable_hybrid_kv_cache_manager is None:
            return self.offload_blocks > 0 and self.release.drops_groups_with_connector
        return self.disable_hybrid_kv_cache_manager

    @property
    def groups(self) -> tuple[KvGroup, ...]:
        """Groups of layers in which KV blocks are kept; those of `kv_groups`, unless the hybrid KV cache is off."""
        has_full = any(group.kind == "full" for group in self.kv_groups)
        window = self.kv_groups[0].window
        # One window that no context exceeds loses nothing, unless not all of it stays findable.
        finds_all = not (self.enable_prefix_caching and self.release.keeps_windows_where_prompts_end)
        never_slides = len(self.kv_groups) == 1 and window >= self.max_model_len and finds_all
        if (self.is_hybrid_cache_off and has_full) or never_slides:
            return (KvGroup(layers=sum(group.layers for group in self.kv_groups)),)
        return self.kv_groups

    @property
    def window_share(self) -> float:
        """Share of the layers that read a window."""
        windowed = sum(group.layers for group in self.kv_groups if group.kind != "full")
        return windowed / sum(group.layers for group in self.kv_groups)

    @property
    def has_groups(self) -> bool:
        """Whether blocks are kept by groups that differ in what their layers read, or all have a window."""
        return len(self.groups) > 1 or self.groups[0].kind != "full"

    @property
    def visits_each_request(self) -> bool:
        """Whether the running requests of a step do not all get a token, so that each has to be looked at."""
        is_plain = self.scheduling_policy == "fcfs" and self.long_prefill_token_threshold == 0
        return not (is_plain and self.enable_chunked_prefill)

    @property
    def tells_blocks_apart(self) -> bool:
        """Whether the simulator follows each KV block, not only those that several requests can use."""
        return self.has_groups or self.visits_each_request

    def most_blocks(self, group: KvGroup, n_tokens: int) -> int:
        """Blocks that a request of `n_tokens` holds at most at one time in a group, as vLLM's admission counts them."""
        blocks = -(-n_tokens // self.block_size)
        if group.kind == "full" or not self.release.knows_that_windows_slide:
            return blocks
        batches = 2 if self.async_scheduling and self.release.counts_all_batches_in_flight else 1
        before = group.window - 1 if group.kind == "sliding" else group.window
        most = -(-min(before + batches * self.max_num_batched_tokens, self.max_model_len) // self.block_size)
        return min(blocks, most + 1 if group.kind == "sliding" else most)

    def least_blocks(self, group: KvGroup, n_tokens: int) -> int:
        """Blocks that a request certainly holds in a group when the last of `n_tokens` is computed."""
        skipped = 0
        if group.kind == "sliding":
            skipped = max(0, n_tokens - group.window) // self.block_size
        elif group.kind == "chunked":
            skipped = (n_tokens - 1) // group.window * group.window // self.block_size
        return -(-n_tokens // self.block_size) - skipped

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
        if "kv_blocks" not in values:
            raise InputError("`kv_blocks` is missing. vLLM logs the number at start-up (`num_gpu_blocks`).")
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
