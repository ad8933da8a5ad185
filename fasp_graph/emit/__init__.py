"""The user's own class with smaller weights, and what its configuration can say of them."""
