"""The study's backbone for one step at a time, with nothing but Python numbers."""

from __future__ import annotations

from stepcal.specs.architecture import ModelArchitecture


def components_us(prefill: int, decode: int, a: ModelArchitecture, peak_flops: float, tp: int) -> tuple[float, ...]:
    """Prefill GEMM, prefill attention, decode GEMM, decode attention, in microseconds."""

    def gemm_flops(tokens: int) -> float:
        total = 0.0
        d, d_kv = a.hidden_size, a.num_kv_heads * a.head_dim
        m = a.experts_per_token / a.num_experts if a.num_experts > 1 else 1.0
        for _ in range(a.num_layers):
            total += 2 * tokens * (d * d + 2 * d * d_kv)  # query, key and value projections
            total += 2 * tokens * d * d  # output projection
            total += 6 * tokens * d * a.intermediate_size * m  # gate, up, down
        return total / tp

    def attention_flops(tokens: int) -> float:
        if tokens == 0:
            return 0.0
        return 2 * (2 * a.num_attention_heads * tokens * max(tokens / 2, 1) * a.head_dim) * a.num_layers / tp

    flops = (gemm_flops(prefill), attention_flops(prefill), gemm_flops(decode), 0.0)
    return tuple(f / peak_flops * 1e6 for f in flops)
