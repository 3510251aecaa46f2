"""Milliseconds per generated token, from what a step reads and the bandwidth that reads it.

    time = (weights read + keys and values read) / (SHARE * bandwidth) + layers * latency

A copy reaches 0.9 of an H200's data sheet. The latency is that of a layer's kernels in a replayed step, fitted to
`benchmarks/results/gpu_plans.json` and `gpu_decode.json`, and for bitsandbytes' kernels to `gpu_weights.json`.
"""

from __future__ import annotations

from .hardware import HOST_BANDWIDTH

SHARE = 0.9
LATENCY, FOREIGN_LATENCY = 0.09e-3, 0.13e-3  # seconds per layer, replayed
EAGER_LATENCY = 0.62e-3  # seconds per layer where each kernel is launched from Python


def token_ms(
    read: int,
    kv: int,
    layers: int,
    bandwidth: float | None,
    *,
    replayed: bool,
    foreign: bool = False,
    on_host: int = 0,
) -> float | None:
    """Expected milliseconds per token of a decode step.

    Args:
        read: bytes of weights on the device that a step reads.
        kv: bytes of keys and values that it reads.
        layers: decoder layers.
        bandwidth: bytes per second; `None` if unknown.
        replayed: whether the step is a CUDA graph.
        foreign: whether another project's kernels multiply with packed weights.
        on_host: bytes of a head that the CPU multiplies with.

    Returns:
        `None` without a bandwidth.
    """
    if bandwidth is None:
        return None
    device = (read + kv) / (SHARE * bandwidth)
    latency = layers * ((FOREIGN_LATENCY if foreign else LATENCY) if replayed else EAGER_LATENCY)
    # Launches from Python run ahead of the device: the longer of the two counts.
    step = device + latency if replayed else max(device, latency)
    return 1e3 * (step + on_host / HOST_BANDWIDTH)
