"""The HTTP side of serving: it checks requests, words answers, and never touches the model."""
