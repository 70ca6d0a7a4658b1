"""Backups of databases: ordered, written, kept and removed."""
