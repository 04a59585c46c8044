"""Files that go into an export as they stand: Transformers loads them beside the weights."""
