"""What a pool counts, for OpenTelemetry and for Prometheus; each of the two modules needs an extra of its name."""
