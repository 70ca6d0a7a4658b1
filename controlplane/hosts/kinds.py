"""What a host can carry."""

FUNCTIONS = "functions"
PROXIES = "proxies"
KINDS = (FUNCTIONS, PROXIES)
