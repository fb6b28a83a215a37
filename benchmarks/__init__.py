"""Speed against the strongest baselines, both sides in one process: ``python -m benchmarks --help``."""
