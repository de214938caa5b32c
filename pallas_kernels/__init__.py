"""Pallas kernels for bsjax: bare arrays and a frozen `Config` in, arrays out."""
