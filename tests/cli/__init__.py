"""Tests of samtune.cli."""
