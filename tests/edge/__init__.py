"""Tests of the edge alone: a real Envoy before a server that does as it is told."""
