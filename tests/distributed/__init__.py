"""Tests of samtune.distributed."""
