"""`python -m samtune`."""

from samtune.cli import main

main()
