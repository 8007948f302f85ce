"""Keys and their actions: pure functions of the screen's state, and the labels of the keys."""
