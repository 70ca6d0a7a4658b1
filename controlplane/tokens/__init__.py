"""API tokens: made, listed, rotated and revoked by a login."""
