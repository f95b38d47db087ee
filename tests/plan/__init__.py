"""Tests of samtune.plan."""
