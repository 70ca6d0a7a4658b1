"""The record of who did what: only ever added to, and chained."""
