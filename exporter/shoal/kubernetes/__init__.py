"""Asks the API server which backends the cluster's services have, and only reads: list and watch of EndpointSlices.

Knows nothing of metrics. Imported only where --kubernetes.endpoints is given: nothing else here needs an API server.
"""
