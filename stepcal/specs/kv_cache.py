"""What a KV cache takes: bytes of a token and of a block, by what it is kept in, and the blocks that a backend can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from stepcal.errors import NotModelledError, shown
from stepcal.simulator.versions import NEWEST, release_of
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.hardware import Accelerator
from stepcal.specs.layer_windows import LayerWindows

KV_BYTES = {"bf16": 2, "fp8": 1}
"""Bytes of an element, by what the cache is kept in."""
AUTO = "auto"
KV_CACHE_DTYPES: Mapping[str, str] = {
    **dict.fromkeys(("bfloat16", "float16", "bf16", "fp16", "half"), "bf16"),
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2"), "fp8"),
}
"""Values of vLLM's ``--kv-cache-dtype`` beside ``auto``, and what the cache is then kept in."""

DEFAULT_BLOCK_SIZE = 16
"""Tokens of a KV block, vLLM's default."""
HOPPER = frozenset({"h100-sxm", "h100-nvl", "h200-sxm"})
DATACENTER_BLACKWELL = frozenset({"b200", "b300-sxm", "gb200", "gb300"})
FORCES_BLOCK_SIZE = "0.15.1"
"""Release that picks the backend of latent attention first and sets the block size to what it reads; later ones ask the
backend that they pick for its smallest size (``vllm/platforms/cuda.py`` and ``interface.py``, 0.15.1 to 0.33.0)."""
FLASH_MLA_BLOCK = 64
FLASHINFER_MLA_BLOCKS = (32, 64)


def block_size_of(
    given: int | None, architecture: ModelArchitecture, accelerator: Accelerator, vllm_version: str, kv_precision: str
) -> tuple[int, list[str]]:
    """Return the tokens of a KV block of a server, and a note where vLLM sets it to what its backend reads.

    Latent attention has backends of its own: FlashMLA reads blocks of 64, FlashInfer of 32 or 64, FlashAttention and Triton
    any multiple of 16 (``get_supported_kernel_block_sizes``). 0.15.1 takes FlashMLA on Hopper, later releases FlashAttention
    unless the cache is in FP8; Blackwell of the data centre takes FlashInfer, others Triton.

    Parameters
    ----------
    given : int or None
        What the server was started with.
    architecture : ModelArchitecture
    accelerator : Accelerator
    vllm_version : str
    kv_precision : {"bf16", "fp8"}
    """
    is_hopper, is_blackwell = accelerator.name in HOPPER, accelerator.name in DATACENTER_BLACKWELL
    if architecture.latent is None or not (is_hopper or is_blackwell):
        return given or DEFAULT_BLOCK_SIZE, []
    if release_of(vllm_version).version == FORCES_BLOCK_SIZE:
        readable = (FLASH_MLA_BLOCK, *(FLASHINFER_MLA_BLOCKS if is_blackwell else ()))
        is_read = given is not None and (given in readable or given % FLASH_MLA_BLOCK == 0)
        found = given if is_read and given is not None else FLASH_MLA_BLOCK
    elif given is not None:
        found = given
    elif is_blackwell:
        found = FLASHINFER_MLA_BLOCKS[0]
    else:
        found = FLASH_MLA_BLOCK if kv_precision == "fp8" else DEFAULT_BLOCK_SIZE
    if found == (given or DEFAULT_BLOCK_SIZE):
        return found, []
    return found, [
        f"KV blocks hold {found} tokens, as vLLM's backend for latent attention reads on {accelerator.name}."
    ]


def kv_precision_of(kv_cache_dtype: str, architecture: ModelArchitecture) -> str:
    """Return what a server keeps the KV cache in: with ``auto`` what the checkpoint asks for, else 16 bits.

    Raises
    ------
    NotModelledError
        If it is kept in other than 16 bits or FP8.
    """
    if kv_cache_dtype == AUTO:
        return architecture.kv_precision
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise NotModelledError(
            f"`kv_cache_dtype: {shown(kv_cache_dtype)}` asks for what the simulator does not model. It models "
            f"{', '.join((AUTO, *KV_CACHE_DTYPES))}."
        )
    return KV_CACHE_DTYPES[kv_cache_dtype]


def kv_bytes_per_token(
    architecture: ModelArchitecture, *, tensor_parallel: int = 1, kv_precision: str | None = None
) -> float:
    """Bytes of one token's keys and values on a rank, all layers; at least one head a rank, so heads replicate.

    Latent attention keeps one vector for all heads, whole on every rank.

    Parameters
    ----------
    architecture : ModelArchitecture
    tensor_parallel : int
    kv_precision : {"bf16", "fp8"}, optional
        What the cache is kept in; by default what the checkpoint asks for.

    Examples
    --------
    >>> from stepcal.specs.architecture import load_architecture
    >>> model = load_architecture("llama-2-70b")
    >>> kv_bytes_per_token(model), kv_bytes_per_token(model, tensor_parallel=4, kv_precision="fp8")
    (327680.0, 40960.0)
    """
    width = float(KV_BYTES[kv_precision or architecture.kv_precision] * architecture.num_layers)
    if architecture.latent is not None:
        return architecture.latent.latent_width * width
    heads = max(architecture.num_kv_heads / tensor_parallel, 1.0)
    return 2.0 * heads * architecture.head_dim * width


@dataclass(frozen=True)
class KvCache:
    """The KV cache of a server.

    Parameters
    ----------
    architecture : ModelArchitecture
    windows : LayerWindows, optional
        Layers with a window. A block then holds the layers of one group, not all.
    tensor_parallel, block_size : int
        Ranks, and tokens of a block.
    kv_precision : {"bf16", "fp8"}, optional
        As in `kv_bytes_per_token`.
    vllm_version : str
        Release that makes the groups.

    Examples
    --------
    >>> from stepcal.specs.architecture import load_architecture
    >>> KvCache(load_architecture("llama-2-70b"), tensor_parallel=4).block_bytes
    1310720.0
    """

    architecture: ModelArchitecture
    windows: LayerWindows | None = None
    tensor_parallel: int = 1
    block_size: int = DEFAULT_BLOCK_SIZE
    kv_precision: str | None = None
    vllm_version: str = NEWEST

    @property
    def block_bytes(self) -> float:
        """Bytes of a block on a rank: what vLLM divides the memory for KV by."""
        windows = self.windows
        layers = self.architecture.num_layers if windows is None else windows.layers_per_block(self.vllm_version)
        a_token = kv_bytes_per_token(
            self.architecture, tensor_parallel=self.tensor_parallel, kv_precision=self.kv_precision
        )
        return self.block_size * a_token * layers / self.architecture.num_layers

    @property
    def pool_block_bytes(self) -> float:
        """Bytes of a block in a pool in CPU memory, of all ranks: every head once, or the latents of every rank."""
        copies = 1 if self.architecture.latent is None else self.tensor_parallel
        return replace(self, tensor_parallel=1).block_bytes * copies
