"""Make transformer models cheaper to run without retraining them."""

__version__ = "0.1.0"
