"""The trigger service: registry events and a poll of the registries start pipeline runs, by rules."""
