"""What writes the generated files of the Helm chart: `python -m helm.generate`."""
