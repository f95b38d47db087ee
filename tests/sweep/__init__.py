"""Tests of samtune.sweep."""
