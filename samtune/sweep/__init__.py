"""The paper's protocol in one command: choose on validation, fit the choice again on all training images, with several
seeds, score test once; SAM beside SGD at equal and at twice the length, or at equal cost.

recipe.py    a recipe's table [sweep] -> what is compared
arms.py      the settings of each arm: its grid, point by point
budget.py    a cost -> a number of steps
plan.py      the runs of each stage
ledger.py    the sweep folder: what became of each run, and what was chosen
images.py    decoded once for all runs
engines.py   where runs take place: here, on its GPUs or the cores of its CPU
cluster.py   the same on a Ray cluster
protocol.py  the story of a sweep, from top to bottom
"""
