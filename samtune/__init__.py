"""samtune: fine-tune pretrained image models with Sharpness-Aware Minimization, and prove what it gained."""

__version__ = "0.1.0"
