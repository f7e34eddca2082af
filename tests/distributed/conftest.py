from two_processes import run_on_two  # noqa: F401  (a fixture)
