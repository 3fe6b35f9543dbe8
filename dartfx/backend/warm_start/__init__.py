"""Compiled code that processes take over from others."""
