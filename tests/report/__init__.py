"""Tests of samtune.report."""
