"""Shoal: a Prometheus exporter for the failures of Linux nodes that ordinary monitoring does not show."""

__all__ = ["__version__"]

__version__ = "0.1.0"
