"""What hosts need beyond the plain calls: one file a host, and nothing below knows of them."""
