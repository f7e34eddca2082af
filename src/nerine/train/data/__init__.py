"""Pictures and captions: found, framed, drawn in order, read, encoded and kept."""
