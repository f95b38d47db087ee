"""Tests of samtune.runs."""
