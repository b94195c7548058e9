"""What a model, a GPU and a deployment are, and what a step asks of a rank in bytes and FLOPs."""
