"""The C alone, built with sanitizers."""
