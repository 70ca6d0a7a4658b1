"""What every RPC shares: the contract, the call, errors, pages, idempotency."""
