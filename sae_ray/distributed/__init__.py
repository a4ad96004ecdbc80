"""The only place that imports ray: work spread over a cluster."""
