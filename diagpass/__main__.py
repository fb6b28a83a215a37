"""``python -m diagpass``: the command line."""

from diagpass.cli.start import main

main()
