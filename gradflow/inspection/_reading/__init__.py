"""A model as a program: its equations in order, its layers, their names."""
