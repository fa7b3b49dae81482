"""Prism's core: what all parts agree on."""

__version__ = "0.1.0"  # images carry no package metadata; a test holds pyproject.toml to it
