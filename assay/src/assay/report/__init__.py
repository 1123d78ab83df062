"""What people and other tools see."""
