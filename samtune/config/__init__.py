"""Settings: the fields of a run, their kinds, and how flags, recipes and defaults become one RunConfig."""
