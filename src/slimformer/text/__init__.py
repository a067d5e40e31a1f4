"""What calibration and training read."""
