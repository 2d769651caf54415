"""Adapters: one file for each library of models, which says what its models are.

A file of this folder has a function ``adapt(model, inputs, kwargs) -> Model | None``: None where
the model is not of its library. It imports the library only if the model's class comes from it.
"""
