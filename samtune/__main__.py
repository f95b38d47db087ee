"""`python -m samtune`."""

from samtune.cli.main import main

main()
