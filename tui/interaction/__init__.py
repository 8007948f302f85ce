"""What the keys of the screen do: methods of the application, grouped by theme."""
