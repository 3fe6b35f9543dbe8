"""How the plugin learns, in each of vLLM's model runners, whose rows a batch holds."""
