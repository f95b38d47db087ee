"""The run folder: status, metrics, checkpoints, the lock, and how an interrupted run is resumed."""
