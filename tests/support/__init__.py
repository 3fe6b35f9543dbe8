"""Models, prompts and programs shared by tests of several folders."""
