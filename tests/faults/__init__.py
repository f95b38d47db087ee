"""What may break, numbered in tests/support/fault_matrix.py, and what then happens."""
