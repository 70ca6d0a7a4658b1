"""Accounts: the customers, their plans and what they use."""
