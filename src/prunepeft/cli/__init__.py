"""The command line: parse, call one function of the library, print."""

from prunepeft.cli.app import app, main

__all__ = ["app", "main"]
