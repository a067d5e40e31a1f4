"""Programs that measure what slimformer claims: `python -m benchmarks list | run | tables`."""
