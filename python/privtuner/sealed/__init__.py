"""The sealed model: a server evaluates and trains a whole encoder on ciphertexts.

The server holds the weights and sees ciphertexts alone; the data owner holds the one secret key, refreshes masked
ciphertexts and decrypts pooled vectors alone.
"""
