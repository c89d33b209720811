"""Measures every operation beside the peers that can run, and says where each one is wrong."""
