"""The operations: what they mean, that all implementations agree, that JAX composes them."""
