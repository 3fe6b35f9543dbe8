"""The code behind ``repro.py``: rebuilds a graph, compiles it, runs it pruned and unpruned."""
