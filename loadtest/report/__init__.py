"""One page and pictures from the records of load runs."""
