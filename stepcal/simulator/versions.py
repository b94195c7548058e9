"""Releases of vLLM whose scheduler was recorded, and what differs between them.

Each was driven on a CPU with `tools/record_vllm.py`, and equals the slow reference on thousands of random scenarios. Its
defaults were recorded with `tools/record_vllm_defaults.py`, which runs its own code for stubs of many GPUs.
A release between two recorded ones has the scheduler of the nearest earlier one, and the defaults that were recorded to
have come by then.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from stepcal.errors import InputError, NotModelledError, shown

_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)(?:\.post\d+)?(?:\+[a-z0-9.]+)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class DefaultLimits:
    """Limits that vLLM's API server chooses on GPUs from some memory on, unless a word of `but` is in their name."""

    from_gib: float
    max_num_batched_tokens: int
    max_num_seqs: int
    but: tuple[str, ...] = ()


_SMALL = DefaultLimits(from_gib=0.0, max_num_batched_tokens=2048, max_num_seqs=256)
_LARGE = DefaultLimits(from_gib=70.0, max_num_batched_tokens=8192, max_num_seqs=1024, but=("a100",))
_LARGE_BUT_GB10 = DefaultLimits(from_gib=70.0, max_num_batched_tokens=8192, max_num_seqs=1024, but=("a100", "gb10"))
_LARGEST = DefaultLimits(from_gib=160.0, max_num_batched_tokens=16384, max_num_seqs=1024)


@dataclass(frozen=True, kw_only=True)
class SamplerPath:
    """Kernel that cuts tokens off (top-k, top-p) where at least `from_requests` are sampled, on CUDA GPUs.

    ``sort`` is PyTorch's sort of all logits, ``triton`` a search for the pivot, ``flashinfer`` drawing until a token lies
    within what is kept.
    """

    kernel: str
    from_requests: int = 0


_SORT, _FLASHINFER = SamplerPath(kernel="sort"), SamplerPath(kernel="flashinfer")
_TRITON_FROM_8 = SamplerPath(kernel="triton", from_requests=8)


@dataclass(frozen=True, kw_only=True)
class VllmRelease:
    """What a release does differently from others.

    Parameters
    ----------
    version : str
    admits_whole_sequences : bool
        Whether a request is admitted only if free blocks would hold all its tokens known so far, though it gets blocks
        for its first chunk alone (vLLM's option `scheduler_reserve_full_isl`, on by default since it exists).
    reuses_unfindable_blocks_first : bool
        Whether freed blocks that no other request can hit go to the front of the queue of free blocks, not to its end.
    gpu_memory_utilization : float
        Default share of the GPU's memory that the server takes.
    default_limits : tuple of DefaultLimits
        By the GPU's memory, most first.
    most_uneven_layers : float
        Quotient of the numbers of layers of two kinds below which they share groups of the larger number, the smaller kind
        padded (``get_kv_cache_groups``).
    knows_that_windows_slide : bool
        Whether admission counts a window with what it holds at most at one time, not with the whole sequence.
    counts_all_batches_in_flight : bool
        Whether that is the window and the tokens of all batches in flight, not of one.
    waits_for_windows_in_flight : bool
        Whether the blocks that a window leaves behind are kept until the step in flight has ended.
    keeps_windows_where_prompts_end : bool
        Whether of a sliding window only the blocks before a prompt's last token stay findable, and those where a prefix that
        others share ends, not all.
    drops_groups_with_connector : bool
        Whether a KV connector, KV offloading included, makes the server keep all layers as if they had full attention.
    holds_offloaded_blocks : bool
        Whether blocks copied to the pool in CPU memory cannot be evicted from it until their request ends, so that a
        small pool rejects requests; newer releases hold them until the copy is done.
    offloads_outputs : bool
        Whether blocks of generated tokens are copied there too, under asynchronous scheduling.
    samplers : tuple of SamplerPath
        By the number of requests, most first.
    captures_token_budget, captures_most_requests : bool
        Whether there is a CUDA graph of the token budget's size, and one of `max_num_seqs` tokens, beside the sizes at
        regular distances, where they are not above the largest one.
    largest_graph_on_blackwell : int
        Largest CUDA graph that is captured on data-centre GPUs of the generation Blackwell, in tokens.
    bounds_long_prefill_threshold : bool
        Whether a `long_prefill_token_threshold` above `max_model_len` is refused; elsewhere it has no effect.
    spares_lone_requests : bool
        Whether `long_prefill_token_threshold` does not hold for a request that is alone in the engine.
    keeps_place_after_preemption : bool
        With priorities: whether a call goes on behind a victim wherever it stood, and behind a request that preempted
        itself. Before, the request behind a victim whose last token was in flight missed its turn, and a request that
        preempted itself ended the call for all behind it.
    """

    version: str
    admits_whole_sequences: bool
    reuses_unfindable_blocks_first: bool
    gpu_memory_utilization: float
    default_limits: tuple[DefaultLimits, ...]
    holds_offloaded_blocks: bool
    offloads_outputs: bool = False
    samplers: tuple[SamplerPath, ...]
    captures_token_budget: bool
    captures_most_requests: bool = False
    largest_graph_on_blackwell: int = 512
    most_uneven_layers: float = 1.5
    knows_that_windows_slide: bool = False
    counts_all_batches_in_flight: bool = False
    waits_for_windows_in_flight: bool = False
    keeps_windows_where_prompts_end: bool = False
    drops_groups_with_connector: bool = False
    bounds_long_prefill_threshold: bool = False
    spares_lone_requests: bool = False
    keeps_place_after_preemption: bool = False

    def limits_on(self, accelerator: str, memory_gib: float) -> DefaultLimits:
        """The limits of a server that was given none, on a GPU by name and memory as the driver reports it.

        Examples
        --------
        >>> release_of("0.33.0").limits_on("h100-sxm", 79.6).max_num_batched_tokens
        8192
        """
        return next(
            tier
            for tier in self.default_limits
            if memory_gib >= tier.from_gib and not any(word in accelerator for word in tier.but)
        )


RELEASES = (
    VllmRelease(
        version="0.15.1",
        admits_whole_sequences=False,
        reuses_unfindable_blocks_first=False,
        gpu_memory_utilization=0.90,
        default_limits=(_LARGE, _SMALL),
        holds_offloaded_blocks=True,
        samplers=(_SORT,),
        captures_token_budget=False,
        most_uneven_layers=1.25,
        drops_groups_with_connector=True,
    ),
    VllmRelease(
        version="0.19.0",
        admits_whole_sequences=True,
        reuses_unfindable_blocks_first=False,
        gpu_memory_utilization=0.90,
        default_limits=(_LARGE, _SMALL),
        holds_offloaded_blocks=True,
        offloads_outputs=True,
        samplers=(_TRITON_FROM_8, _SORT),
        captures_token_budget=False,
        drops_groups_with_connector=True,
    ),
    VllmRelease(
        version="0.24.0",
        admits_whole_sequences=True,
        reuses_unfindable_blocks_first=True,
        gpu_memory_utilization=0.92,
        default_limits=(_LARGE, _SMALL),
        holds_offloaded_blocks=False,
        samplers=(_FLASHINFER,),
        captures_token_budget=True,
        knows_that_windows_slide=True,
    ),
    VllmRelease(
        version="0.33.0",
        admits_whole_sequences=True,
        reuses_unfindable_blocks_first=True,
        gpu_memory_utilization=0.92,
        default_limits=(_LARGEST, _LARGE_BUT_GB10, _SMALL),
        holds_offloaded_blocks=False,
        samplers=(_FLASHINFER,),
        captures_token_budget=True,
        captures_most_requests=True,
        largest_graph_on_blackwell=1024,
        knows_that_windows_slide=True,
        counts_all_batches_in_flight=True,
        waits_for_windows_in_flight=True,
        keeps_windows_where_prompts_end=True,
        bounds_long_prefill_threshold=True,
        spares_lone_requests=True,
        keeps_place_after_preemption=True,
    ),
)
"""Recorded releases, oldest first."""

_CAME_WITH: tuple[tuple[str, dict[str, Any]], ...] = (
    ("0.18.0", {"samplers": (_TRITON_FROM_8, _SORT), "offloads_outputs": True}),
    ("0.20.0", {"gpu_memory_utilization": 0.92}),
    ("0.21.0", {"samplers": (_FLASHINFER,), "captures_token_budget": True, "holds_offloaded_blocks": False}),
    ("0.23.0", {"offloads_outputs": False}),
    ("0.29.0", {"default_limits": (_LARGEST, _LARGE, _SMALL), "largest_graph_on_blackwell": 1024}),
)
"""Releases whose defaults and offloading alone were recorded, and what they brought (or a release just before them)."""

OLDEST, NEWEST = RELEASES[0].version, RELEASES[-1].version


def _number(version: str) -> tuple[int, ...]:
    match = _VERSION.fullmatch(version)
    if match is None:
        raise InputError(
            f"`vllm_version` is {shown(version)}; it must be a release of three numbers, like {NEWEST}. "
            f"Recorded: {', '.join(release.version for release in RELEASES)}."
        )
    return tuple(int(part) for part in match.groups())


def release_of(version: str) -> VllmRelease:
    """The recorded release whose rules a version is simulated with: itself, or the nearest earlier one.

    Defaults of a version in between are those that were recorded to have come by then.

    Raises
    ------
    InputError
        If it is no release number.
    NotModelledError
        If it is older than all recorded ones.

    Examples
    --------
    >>> release_of("0.33.0").version, release_of("0.21.0").version
    ('0.33.0', '0.19.0')
    """
    number = _number(version)
    earlier = [release for release in RELEASES if _number(release.version) <= number]
    if not earlier:
        raise NotModelledError(
            f"`vllm_version: {version}` is older than the oldest release whose scheduler was recorded, {OLDEST}. "
            f"vLLM versions that are modelled: {OLDEST} and newer."
        )
    release = earlier[-1]
    for since, changes in _CAME_WITH:
        if _number(release.version) < _number(since) <= number:
            release = replace(release, **changes)
    return release


def version_note(version: str) -> str | None:
    """What to tell a user whose version was not recorded itself, or None."""
    release = release_of(version)
    if _number(release.version) == _number(version):
        return None
    newest = " the newest recorded one" if release.version == NEWEST else " the nearest earlier one that was recorded"
    return f"vLLM {version} was not recorded; it is simulated as {release.version},{newest}."
