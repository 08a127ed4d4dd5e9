"""What training loops share: optimizer, schedule, progress, state."""
