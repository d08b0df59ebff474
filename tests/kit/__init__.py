"""What the tests share: servers, an independent look into them, waiting for a condition, event loops."""
