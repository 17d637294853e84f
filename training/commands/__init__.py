"""The commands of ``segnode-train``: one module each, with a ``register(app)``."""
