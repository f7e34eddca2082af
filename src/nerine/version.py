"""The version of the library, in the one place that the package and its files read it from."""

__version__ = "0.1.0"
