"""Make transformer models cheaper to run without retraining them."""

from slimformer.calibration.calibrate import calibrate
from slimformer.methods.layer_drop import LayerDrop
from slimformer.patching import patch, patched, status, unpatch
from slimformer.plan import Plan

__version__ = "0.1.0"
__all__ = ["LayerDrop", "Plan", "calibrate", "patch", "patched", "status", "unpatch"]
