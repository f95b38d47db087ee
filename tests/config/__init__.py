"""Tests of samtune.config."""
