"""How a login at the provider fails, for the log; what the caller reads is in `oidc.py`."""


class Refused(Exception):
    """What came back from the issuer does not hold; why is for the log."""


class Broken(Exception):
    """The issuer does not answer, or not as OpenID Connect has it; how is for the log."""
