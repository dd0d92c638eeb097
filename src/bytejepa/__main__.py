"""`python -m bytejepa` is the command `bytejepa`."""

from bytejepa.cli import run

if __name__ == "__main__":
    run()
