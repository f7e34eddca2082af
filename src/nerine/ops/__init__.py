"""Pure functions on tensors, one idea a file. They know neither modules nor algorithms, and never choose a device."""
