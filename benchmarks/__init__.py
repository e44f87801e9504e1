"""Everything that README, documentation and model cards quote, printed again: ``python -m benchmarks``."""
