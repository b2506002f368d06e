"""Example: a small language model of English and one of Python code become one."""
