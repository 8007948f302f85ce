"""Windows over the screen: help, questions, searches."""
