"""Tests of samtune.guide."""
