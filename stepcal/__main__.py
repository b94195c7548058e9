"""``python -m stepcal``: the same as the command `stepcal`."""

from stepcal.cli.main import app

app(prog_name="stepcal")
