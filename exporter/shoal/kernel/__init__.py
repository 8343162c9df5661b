"""Reads the kernel and returns plain records in base units; knows nothing of metrics."""
