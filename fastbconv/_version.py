"""The one place where the version is written; setup.py reads this file by path."""

__version__ = "0.1.0"
