"""Key handlers: methods of the application, grouped by theme."""
