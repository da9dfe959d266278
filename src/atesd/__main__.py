"""`python -m atesd`, as launchers start it."""

from atesd.cli.main import main

if __name__ == "__main__":
    main()
