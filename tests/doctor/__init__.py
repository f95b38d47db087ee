"""Tests of samtune.doctor."""
