"""`python -m nerine`: the command line, for launchers that start modules: `accelerate launch -m nerine train`."""

from nerine.cli import main

if __name__ == "__main__":
    main()
