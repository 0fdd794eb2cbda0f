"""Everything between Triton Inference Server and the engine process."""
