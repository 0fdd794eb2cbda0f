"""The sidecar that dims the model just enough to keep its latency promises."""
