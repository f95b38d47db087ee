"""Tests of samtune.sam."""
