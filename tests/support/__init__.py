"""Helpers that tests of several modules share. No test module imports another one."""
