"""What keys change in the screen's state: pure functions, the state in, the next state out."""
