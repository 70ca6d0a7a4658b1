"""`python -m controlplane` is `controlplane`."""

from controlplane.cli.main import main

main()
