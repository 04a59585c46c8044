"""Who computes which matrix, and how matrices travel between ranks."""
