"""Costs that the answer decides: reading them from it, and settling what was reserved for them."""
