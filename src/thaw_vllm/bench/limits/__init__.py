"""What the hardware bears, measured with as little between it and the clock as Python allows."""
