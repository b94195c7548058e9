"""The kernel model on the 16 runs, on 31 that nothing was fitted to, and on public benchmarks."""
