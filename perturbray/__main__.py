"""`python -m perturbray`."""

from perturbray.cli import command

command()
