"""The proof. Files mirror the library: tests/ops proves bsjax/ops."""
