"""Talks to Redis and Valkey servers, and only reads: PING, INFO, CONFIG GET, LATENCY LATEST, and AUTH where one asks.

Knows nothing of metrics. redis-py is imported by `client` alone, psutil by `discovery`, so that an exporter
without servers to watch loads neither.
"""
