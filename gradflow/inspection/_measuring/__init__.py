"""What is measured of a program: signals and gradients of many random networks."""
