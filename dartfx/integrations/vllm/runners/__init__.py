"""Maps batch rows to requests, for each of vLLM's model runners."""
