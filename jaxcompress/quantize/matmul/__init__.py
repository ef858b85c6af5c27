"""Matrix products in integers."""
