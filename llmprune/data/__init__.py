"""Text to token windows, for calibration and evaluation."""
