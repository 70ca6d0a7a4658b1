"""What runs customers' functions: the sandbox, its workers, and what makes use of them."""
