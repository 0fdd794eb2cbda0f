"""Expert weights in slots, and the tables that say which slot serves which logical expert."""
