"""What compressed sites cost in accuracy."""
