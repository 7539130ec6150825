"""Throughput benchmarks: the critic step here against the ways to write it in PyTorch and in JAX, in one run.

The reader's path: ``workloads`` (what is computed) -> ``variants`` (the ways to compute it) -> ``check`` (each is right
before it is timed) -> ``measure`` and ``limit`` (what it costs and could cost) -> ``run`` -> ``report``.
"""
