"""The drivers of database engines, one a module, behind the seam in `engine.py`."""
