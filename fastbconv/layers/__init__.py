"""Layers: parameters and defaults around the functional interface."""
