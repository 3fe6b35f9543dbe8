"""What a dump's ``repro.py`` runs: rebuilds its graph, compiles it, runs it pruned and unpruned."""
