"""Elastic experts (MoEless, arXiv 2603.06350): predict expert load, scale and place expert functions, and simulate it."""
