"""`python -m prunepeft` is the command line, for `torchrun -m prunepeft`."""

from prunepeft.cli import main

if __name__ == "__main__":
    main()
