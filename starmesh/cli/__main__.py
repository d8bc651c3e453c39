"""``python -m starmesh.cli``: the ``starmesh`` command where its script is not on PATH."""

from starmesh.cli.app import main

main()
