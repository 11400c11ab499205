"""Adapters that were trained on the original base, for the folded one (E14)."""
