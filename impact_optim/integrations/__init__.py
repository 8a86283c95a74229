"""Callbacks for the loops of others: ``integrations.lightning`` and ``integrations.transformers``."""
