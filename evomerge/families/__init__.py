"""Small real expert families that train on two CPU cores: for the demo, the tests and the benchmarks."""
