"""Training of the light codec."""
