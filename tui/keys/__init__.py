"""The keys of the screen: what each does, and what it is called on the screen."""
