"""Realtide: one server for models that are causal, cached and live."""

__version__ = "0.1.0"
