"""What single weights are worth."""
