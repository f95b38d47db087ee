"""Tests of samtune.predict."""
