"""Servers that a local run starts for itself, where an installation at scale has clusters."""
