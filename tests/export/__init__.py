"""Tests of samtune.export."""
