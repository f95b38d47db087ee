"""Tests of samtune.data."""
