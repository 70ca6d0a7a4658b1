"""Who may call what, from where, how often, and how much of it they may have."""
