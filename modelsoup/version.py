"""The version, where the build and the lineage find it."""

__version__ = "0.1.0"
