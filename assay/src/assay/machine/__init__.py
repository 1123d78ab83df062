"""What the machine is, what else ran on it, and who has it for himself."""
