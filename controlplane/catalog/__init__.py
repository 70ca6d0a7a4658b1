"""What the provider sells and where: plans, SKUs, regions, clusters."""
