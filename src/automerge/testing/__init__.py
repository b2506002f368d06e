"""Conformance suites that the built-in plug-ins pass and that the authors of other plug-ins can run on theirs."""
