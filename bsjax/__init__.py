"""bsjax: sparse networks in JAX that are faster than dense ones on the wall clock."""
