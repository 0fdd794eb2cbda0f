"""`make demo`: the model answers, then meets one burst twice, with brownout off and on."""
