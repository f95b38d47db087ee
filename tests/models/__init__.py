"""Tests of samtune.models."""
