"""Programs and references of the tests inside vLLM."""
