"""Tests of samtune.sharpness."""
