"""Browser logins."""
