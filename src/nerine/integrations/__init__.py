"""Hosts: programs that nerine is at home in. Each knows its host's words; nothing below this floor does."""
