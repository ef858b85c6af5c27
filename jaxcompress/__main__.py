"""`python -m jaxcompress`: the command line."""

from jaxcompress.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
