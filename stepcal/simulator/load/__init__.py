"""What clients send and when: arrivals, sessions, replays, workload files of inference-perf."""
