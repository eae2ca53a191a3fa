"""Weights in and out: named backbones and classifiers, key maps, exports."""
