"""`python -m realtide.cli`, which the command line uses to start a server of its own."""

from realtide.cli.main import main

main()
