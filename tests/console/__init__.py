"""Tests of samtune.console."""
