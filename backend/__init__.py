"""BrownoutServe's inference engine and its Triton Python-backend adapter."""
