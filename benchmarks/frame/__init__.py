"""What every benchmark stands on: inputs, checks, times, result files, tables."""
