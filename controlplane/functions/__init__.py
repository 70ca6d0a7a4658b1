"""Serverless functions."""
