"""What is predicted of a program: its infinite-width limit, equation by equation."""
