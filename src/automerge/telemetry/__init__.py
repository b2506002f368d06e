"""What the stages tell the world while they run: Prometheus metrics and structured logs."""
