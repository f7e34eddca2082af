"""Where nerine meets one host each: what a host asks for, in its own words, and nothing that the core would know."""
