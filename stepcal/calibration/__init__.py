"""Parameters from training rows, closed loop or not, and what they are worth."""
