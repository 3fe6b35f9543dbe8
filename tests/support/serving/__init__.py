"""What the tests inside vLLM run and compare with."""
