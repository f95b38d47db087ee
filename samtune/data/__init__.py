"""Data: a name or a folder -> labelled images -> batches."""
