"""The version: below everything, so that whoever writes it into a file need not know the whole package."""

__version__ = "0.1.0"
