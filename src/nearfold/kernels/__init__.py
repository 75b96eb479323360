"""Tensors in, tensors out: torch.library operators. Knows no grammar."""
