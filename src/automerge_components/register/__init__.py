"""The component ``register``."""

from automerge_components.register.component import register

__all__ = ["register"]
