"""Managed databases: the API, their rows, the steps that make them real, the engines that hold them."""
