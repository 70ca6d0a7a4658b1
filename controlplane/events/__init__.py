"""The feed of what happened in an account."""
