"""Which rank computes which matrix, and how matrices are sent between ranks."""
