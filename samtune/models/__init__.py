"""Pretrained models: names, weights, a new head."""
