"""`python -m torchdyn_snopt`: the command `torchdyn-snopt`."""

from torchdyn_snopt.cli import app

if __name__ == "__main__":
    app()
