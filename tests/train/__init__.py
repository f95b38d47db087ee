"""Tests of samtune.train."""
