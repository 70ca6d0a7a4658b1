"""The description of this API, for programs."""
