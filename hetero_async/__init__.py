"""Train one PyTorch model on accelerators in several datacentres, asynchronously, and lose nothing."""
