"""Teachers and their outputs."""
