"""Networks in integers alone."""
