"""What the two scripts do, once their flags are read: train (or transform) and merge."""
