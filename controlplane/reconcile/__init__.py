"""Makes what was ordered real, of whatever kind it is."""
