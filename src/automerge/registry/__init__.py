"""Registries: where a merged model gets a version, with its evidence and its lineage."""
