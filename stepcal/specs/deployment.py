"""A deployment: which model runs on which GPU, over how many ranks, under which limits of the server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from stepcal.errors import InputError
from stepcal.simulator.config import KvGroup, ServerConfig, check_block_size
from stepcal.simulator.versions import NEWEST
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.hardware import Accelerator
from stepcal.specs.kv_cache import AUTO, DEFAULT_BLOCK_SIZE, KvCache, block_size_of, kv_bytes_per_token, kv_precision_of
from stepcal.specs.layer_windows import LayerWindows
from stepcal.specs.sampling import NEUTRAL, Sampling
from stepcal.units import BYTES_PER_GIB

MOST_MEMORY_OVER_NAME = 1.08
"""A GPU's memory over what its name says: 80 GB can be 85.9e9 bytes (``data/hardware/wheel_datasheet.csv``)."""


@dataclass(frozen=True)
class Deployment:
    """A model on a GPU, over some tensor-parallel ranks, with or without the limits of its server.

    It checks itself once; whoever takes a deployment need not check its parts again.

    Parameters
    ----------
    architecture : ModelArchitecture
    accelerator : Accelerator
    tensor_parallel : int
        Ranks that share each layer.
    server : ServerConfig, optional
        Scheduler limits. The work of a single step needs none; a simulation does. Where layers of the model read a window
        only, its `kv_groups` are those of the model unless it has some already.
    sampling : Sampling
        Sampling parameters of the requests, in as far as all share them; by default nothing is cut off or penalised.
    kv_cache_dtype : str
        vLLM's ``--kv-cache-dtype``: ``auto`` (what the checkpoint asks for, else 16 bits), 16 bits or FP8.

    Raises
    ------
    InputError
        If `tensor_parallel` does not divide the attention heads.
    NotModelledError
        If the KV cache is kept in other than 16 bits or FP8.

    Examples
    --------
    >>> import stepcal
    >>> served = stepcal.Deployment.of("llama-2-70b", "h100-sxm", tensor_parallel=4, kv_blocks=20_000)
    >>> served.tensor_parallel, served.limits.kv_blocks, served.limits.max_num_seqs
    (4, 20000, 128)
    """

    architecture: ModelArchitecture
    accelerator: Accelerator
    tensor_parallel: int = 1
    server: ServerConfig | None = None
    sampling: Sampling = NEUTRAL
    kv_cache_dtype: str = AUTO

    @classmethod
    def of(
        cls,
        architecture: str,
        accelerator: str,
        *,
        tensor_parallel: int = 1,
        kv_cache_dtype: str = AUTO,
        **limits: Any,
    ) -> Deployment:
        """Return the deployment of a model on a GPU, both by name.

        Parameters
        ----------
        architecture : str
            Of a model that ships, or the path of a ``config.json``.
        accelerator : str
            GPU.
        tensor_parallel : int
        kv_cache_dtype : str
        **limits
            Of the server, as `stepcal.simulator.ServerConfig` takes them: `kv_blocks` and others. Without any, the
            deployment names no server. `block_size` is by default what vLLM's backend for the model reads.

        Raises
        ------
        InputError
            If a name is unknown, a limit is unknown or out of bounds, or `max_model_len` exceeds the model's positions.
        """
        if "tensor_parallel_size" in limits:
            raise InputError("`tensor_parallel_size` is called `tensor_parallel` here.")
        model, gpu = ModelArchitecture.load(architecture), Accelerator.load(accelerator)
        if not limits:
            return cls(model, gpu, tensor_parallel, kv_cache_dtype=kv_cache_dtype)
        server = ServerConfig.from_vllm_arguments(limits)
        given = check_block_size(server.block_size) if "block_size" in limits else None
        precision = kv_precision_of(kv_cache_dtype, model)
        size, _ = block_size_of(given, model, gpu, server.vllm_version, precision)
        if "max_model_len" in limits:
            model.check_max_model_len(server.max_model_len)
        return cls(model, gpu, tensor_parallel, replace(server, block_size=size), kv_cache_dtype=kv_cache_dtype)

    def __post_init__(self) -> None:
        self.architecture.check_tensor_parallel(self.tensor_parallel)
        kv_precision_of(self.kv_cache_dtype, self.architecture)
        server = self.server
        windows = None if server is None else self.architecture.windows_of(server.vllm_version)
        if windows is not None and server is not None and server.kv_groups == (KvGroup(),):
            object.__setattr__(self, "server", replace(server, kv_groups=windows.kv_groups(server.vllm_version)))

    @property
    def windows(self) -> LayerWindows | None:
        """Layers that read a window below the server's context limit; None where none does."""
        if self.server is None:
            return self.architecture.windows_within(None)
        return self.architecture.windows_within(self.server.max_model_len, self.server.vllm_version)

    @property
    def sliding(self) -> tuple[KvGroup, ...]:
        """The windows of those layers, as a batch knows them."""
        windows = self.windows
        return () if windows is None else (KvGroup(windows.kind, windows.window, layers=windows.n_windowed),)

    @property
    def limits(self) -> ServerConfig:
        """The server's limits.

        Raises
        ------
        InputError
            If the deployment names no server.
        """
        if self.server is None:
            raise InputError(
                f"The deployment of `{self.architecture.name}` names no `server`, and a simulation needs its limits. "
                "Give it a `ServerConfig`."
            )
        return self.server

    @property
    def kv_precision(self) -> str:
        """What the KV cache is kept in: ``bf16`` (any 16 bits) or ``fp8``."""
        return kv_precision_of(self.kv_cache_dtype, self.architecture)

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of a token's keys and values on a rank, all layers."""
        return kv_bytes_per_token(
            self.architecture, tensor_parallel=self.tensor_parallel, kv_precision=self.kv_precision
        )

    @property
    def kv_cache(self) -> KvCache:
        """The KV cache: bytes of its blocks."""
        version = NEWEST if self.server is None else self.server.vllm_version
        windows = self.architecture.windows_of(version)
        if self.server is not None and windows is not None:
            windows = windows.in_cache(is_hybrid_cache_off=self.server.is_hybrid_cache_off)
        return KvCache(self.architecture, windows, self.tensor_parallel, self.block_size, self.kv_precision, version)

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        return DEFAULT_BLOCK_SIZE if self.server is None else self.server.block_size

    @property
    def memory_note(self) -> str | None:
        """A sentence where the weights and the server's KV blocks do not fit on the GPU; None where they do."""
        if self.server is None:
            return None
        weights = self.architecture.weights_bytes_of_a_rank(self.tensor_parallel)
        kv, memory = self.server.kv_blocks * self.kv_cache.block_bytes, self.accelerator.hbm_capacity_bytes
        if weights + kv <= MOST_MEMORY_OVER_NAME * memory:
            return None
        weights_gib, kv_gib, memory_gib = (n_bytes / BYTES_PER_GIB for n_bytes in (weights, kv, memory))
        return (
            f"No such server starts: the weights of `{self.architecture.name}` ({weights_gib:,.0f} GiB a rank) and "
            f"{self.server.kv_blocks:,} KV blocks ({kv_gib:,.0f} GiB) are more than the {memory_gib:,.0f} GiB of "
            f"{self.accelerator.name}."
        )

    @property
    def offload_blocks(self) -> int:
        """KV blocks of the offload pool, 0 without one."""
        return 0 if self.server is None else self.server.offload_blocks

    def with_server(self, **changes: Any) -> Deployment:
        """Return the same deployment with some of its server's limits changed.

        Raises
        ------
        InputError
            If it names no server, or a limit is out of bounds.
        """
        if self.architecture.windows is not None:
            changes = {"kv_groups": (KvGroup(),), **changes}
        return replace(self, server=replace(self.limits, **changes))
