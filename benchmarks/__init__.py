"""Measurements side by side; each prints ratios. Nothing here is a test: machines are shared and noisy."""
