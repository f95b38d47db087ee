"""The paper's protocol: choose on validation, train the choice on all training images with several seeds, test once.

spec.py          the table [sweep] of a recipe
arms.py          the arms: their grids and settings
budget.py        a cost -> a number of steps
plan.py          the runs of each stage
ledger.py        the sweep folder: states of the runs, and choices
decode_once.py   images decoded once for all runs
executors.py     runs on this machine; ray_executor.py on a Ray cluster
run.py           a sweep from top to bottom
report.py        the report; verdict.py its sentences, tables.py its tables, page.py its page
"""
