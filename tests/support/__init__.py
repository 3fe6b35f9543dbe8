"""Models, prompts and programs that tests of several folders share."""
