"""Sharpness of a loss around a model's weights: m-sharpness, the Hessian's spectrum, slices.

`lanczos` and `hessian` know no network: an operator takes a loss over data and parameters, Lanczos takes products.
"""
