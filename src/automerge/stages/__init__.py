"""Stages: fetch, segment, search, merge, evaluate, register; plain functions from folders to a folder."""
