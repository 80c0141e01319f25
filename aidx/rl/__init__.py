"""Linear Q-learning."""
