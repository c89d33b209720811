"""What tests and benchmarks share: named shapes, and makers of random inputs."""
