"""Where a plan meets somebody else's model: one module a framework."""
