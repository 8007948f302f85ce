"""Keys and what they do: pure functions of the screen's state, and the labels that name them."""
